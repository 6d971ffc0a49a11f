"""The page of a report in a browser: what a reader sees and can choose."""

import json

from report_runs import browse, document, in_browser, make_run, sample

from wmtp.reporting import write_report

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">&lt;<!--"


@in_browser
def test_a_page_has_curves_weights_facts_and_coloured_texts_that_explain_themselves(tmp_path):
    weights = [[None, 1.0, 4.0, 0.25, 0.0], [None, None, 1.0, 1.0, 0.0]]
    shown = document(["def", " f", "(x)", ":\n", "  pass"], weights=weights, reference_loss=[None, 0.5, 1.25, 2.0, 3.0])
    run = make_run(tmp_path, samples=[sample(1, shown), sample(20, shown)])
    found = browse(
        write_report([run]),
        """
        const tokens = [...document.querySelectorAll('.text .token')];
        const before = {
          lead: document.querySelector(".lead").textContent, delta: document.querySelector('.delta b').textContent,
          headings: [...document.querySelectorAll('h2')].map(e => e.textContent),
          charts: [...document.querySelectorAll('figcaption')].map(e => e.textContent),
          drawn: document.querySelectorAll('canvas').length,
          legend: [...document.querySelector('figure').querySelectorAll('.u-label')].map(e => e.textContent),
          facts: Object.fromEntries([...document.querySelectorAll('dl div')].map(e => [...e.children].map(c => c.textContent))),
          texts: tokens.map(e => e.textContent), classes: tokens.map(e => e.className),
          colours: tokens.map(e => e.style.background) };
        tokens[2].dispatchEvent(new PointerEvent('pointerenter'));
        const tip = document.querySelector('body > .tip');
        before.tip = [...tip.querySelectorAll('tr')].map(r => [...r.children].map(c => c.textContent));
        before.rest = tip.textContent;
        return before;
        """,
    )
    assert found["headings"][:2] == ["Texts, each token coloured by the weight it got", "Loss of every head"]
    assert found["headings"][-1] == "Run"
    assert found["lead"] == "Finished: rho1-wmtp brought loss from 3 at step 1 to 0.15 at step 20."
    assert found["delta"] == "−2.85"
    assert {"loss", "weight/mean", "run"} <= set(found["charts"])
    assert found["drawn"] == len(found["charts"])
    assert found["legend"] == ["step", "all heads", "head 1", "head 2"]
    assert found["facts"]["trainer"] == "rho1-wmtp"
    assert found["facts"]["last loss"] == "0.15"
    assert found["texts"] == ["def", " f", "(x)", ":↵\n", "  pass"]
    # the mean of the heads: nothing known, 1, 2.5, 0.625 and 0, around the step's mean of 1
    assert [name.split()[1:] for name in found["classes"]] == [["given"], [], [], [], ["skipped"]]
    assert found["colours"][:2] == ["", ""]
    assert "--hot" in found["colours"][2]
    assert "--cold" in found["colours"][3]
    assert found["tip"] == [["head", "weight", "loss"], ["1", "4", "1.7"], ["2", "1", "2.7"]]
    assert "reference loss: 1.25" in found["rest"]
    assert '"(x)"' in found["rest"]


@in_browser
def test_every_figure_and_table_is_saved_and_the_sample_is_shown(tmp_path):
    run = make_run(tmp_path, samples=[sample(5, document(["def", " f", "()"]))])
    said = {"prompt": "def add(", "before": "): pass", "after": "a, b): return a + b"}
    (run / "sample.json").write_text(json.dumps(said))
    script = """
      const saved = [];
      URL.createObjectURL = blob => { saved.push(blob.type); return "blob:x"; };
      const figures = document.querySelectorAll("figure").length;
      const tables = document.querySelectorAll("table.facts, #facts dl").length;
      const buttons = [...document.querySelectorAll(".saves button")];
      buttons.filter(one => one.textContent !== "PNG").forEach(one => one.click());
      const names = buttons.map(one => one.getAttribute("aria-label"));
      return { saved, figures, tables, kinds: buttons.map(one => one.textContent),
        distinct: new Set(names).size === names.length,
        sample: [...document.querySelectorAll("#sample dd")].map(one => one.textContent) };
    """
    found = browse(write_report([run]), script)
    assert found["figures"] >= 3
    assert [found["kinds"].count(kind) for kind in ("SVG", "PNG")] == [found["figures"]] * 2
    assert found["kinds"].count("CSV") == found["tables"] == 2
    assert sorted(set(found["saved"])) == ["image/svg+xml", "text/csv"]
    assert len(found["saved"]) == found["figures"] + found["tables"]
    assert found["distinct"]
    assert found["sample"] == list(said.values())


@in_browser
def test_head_colour_and_step_can_be_chosen(tmp_path):
    late = document(["a", "b", "c"], advantage=[None, 2.0, -2.0], weights=[[None, 2.0, 0.5], [None, None, 1.0]])
    early = document(["a", "b", "c"], advantage=[None, -1.0, 1.0], weights=[[None, 1.0, 1.0], [None, None, 1.0]])
    run = make_run(tmp_path, samples=[sample(1, early), sample(20, late)])
    found = browse(
        write_report([run]),
        """
        const seen = [];
        const look = () => seen.push([...document.querySelectorAll('.text .token')].map(
          e => e.style.background.match(/hot|cold/)?.[0] ?? ''));
        const choose = (n, value) => {
          const box = document.querySelectorAll('#texts select')[n];
          box.value = value; box.dispatchEvent(new Event('change'));
        };
        choose(1, '0'); look();
        choose(1, '1'); look();
        choose(2, 'advantage'); look();
        const slider = document.querySelector('#texts input[type=range]');
        slider.value = '0'; slider.dispatchEvent(new Event('input')); look();
        return seen;
        """,
    )
    assert found == [["", "hot", "cold"], ["", "", ""], ["", "hot", "cold"], ["", "cold", "hot"]]


@in_browser
def test_tokens_are_reached_by_keyboard(tmp_path):
    run = make_run(tmp_path, samples=[sample(1, document(["a", "b", "c"]))])
    found = browse(
        write_report([run]),
        """
        const text = document.querySelector('.text'), tip = document.querySelector('body > .tip'), seen = [];
        const press = key => {
          document.activeElement.dispatchEvent(new KeyboardEvent('keydown', { key, bubbles: true }));
          seen.push([document.activeElement.textContent, tip.hidden ? '' : tip.querySelector('code').textContent]);
        };
        text.focus();
        ['ArrowRight', 'ArrowRight', 'ArrowLeft', 'End', 'ArrowRight', 'Escape'].forEach(press);
        return seen;
        """,
    )
    assert found == [["a", '"a"'], ["b", '"b"'], ["a", '"a"'], ["c", '"c"'], ["c", '"c"'], ["c", ""]]


@in_browser
def test_texts_are_only_text(tmp_path):
    hostile = document(
        [HOSTILE, "한글 👩‍🔬", "\u2028\u2029\x00", "", HOSTILE], id=HOSTILE, reference_loss=[None, 1.0, None, 0.0, -1.0]
    )
    run = make_run(tmp_path, "a&b <i>", status=HOSTILE, samples=[sample(1, hostile, stage=HOSTILE)], trainer=HOSTILE)
    page = write_report([run])
    assert "<img" not in page.read_text()
    found = browse(
        page,
        """
        const tokens = [...document.querySelectorAll('.token')];
        tokens.forEach(one => one.dispatchEvent(new PointerEvent('pointerenter')));
        return [tokens.map(e => e.textContent), document.querySelectorAll('img, main script, main i i').length, document.title,
          document.querySelector('h1').textContent];
        """,
    )
    assert found[0] == [HOSTILE, "한글 👩‍🔬", "\u2028\u2029\x00", "·", HOSTILE]
    assert found[1:] == [0, "a&b <i> · WMTP", "a&b <i>"]
