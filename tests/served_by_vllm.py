"""Serves a folder by vLLM, with and without speculation; run in an environment of vLLM's own, without WMTP.

python served_by_vllm.py FOLDER PROMPTS.json NEW_TOKENS DRAFTS DTYPE: prints one JSON object. PROMPTS.json holds lists
of token ids.
"""

import json
import os
import sys
import time

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from vllm import LLM, SamplingParams


def main():
    folder, prompts_file, count, drafts = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    with open(prompts_file, encoding="utf-8") as file:
        prompts = [{"prompt_token_ids": ids} for ids in json.load(file)]
    options = {
        "model": folder,
        "dtype": sys.argv[5],
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_seqs": 4,
        "skip_tokenizer_init": True,
        "disable_log_stats": False,
        "enable_prefix_caching": False,
    }
    if drafts:
        options["speculative_config"] = {"method": "mtp", "num_speculative_tokens": drafts}
    server = LLM(**options)
    sampling = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
    # one by one: a row that ends early may not hide drafts of others
    texts, seconds = [], []
    for prompt in prompts:
        began = time.perf_counter()
        texts.append(list(server.generate([prompt], sampling, use_tqdm=False)[0].outputs[0].token_ids))
        seconds.append(time.perf_counter() - began)
    found = {"texts": texts, "seconds": seconds}
    for metric in server.get_metrics():
        if "spec_decode" in metric.name:
            found[metric.name] = getattr(metric, "value", None) or getattr(metric, "values", None)
    print("RESULT " + json.dumps(found))


if __name__ == "__main__":
    main()
