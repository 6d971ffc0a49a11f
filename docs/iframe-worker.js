// Search of pages that were opened from a folder: browsers start no worker from a file, so its script runs in a hidden frame.
// The name is one that the theme looks for (mkdocs.yml, extra.polyfills).
if (location.protocol === "file:") {
  window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      this.window = frame.contentWindow;
      this.window.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data })); // from the script
      this.window.importScripts = async (...names) => {
        for (const name of names) await add(this.window.document, name);
      };
      this.ready = add(this.window.document, url);
    }
    async postMessage(data) {
      await this.ready;
      this.window.dispatchEvent(new MessageEvent("message", { data }));
    }
  };
  const add = (page, source) =>
    new Promise((resolve, reject) => {
      const script = page.createElement("script");
      Object.assign(script, { src: source, onload: resolve, onerror: reject });
      page.head.append(script);
    });
  window.Worker = window.IFrameWorker;
}
