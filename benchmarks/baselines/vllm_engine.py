"""vLLM behind side_by_side.py; runs in vLLM's own environment and needs nothing of ours.

python vllm_engine.py MODEL_FOLDER SETTINGS    SETTINGS: JSON for vllm.LLM

A line in, {"ids": prompt, "limit": new tokens, "ends": [ids]}; a line out, {"ids", "prefill", "decode", "passes"}.
"""

import json
import os
import sys
import time

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # vLLM and what it loads print as they like
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def main() -> None:
    import vllm
    from vllm import LLM, SamplingParams

    settings = {"max_model_len": 4096, "max_num_seqs": 1, "enable_prefix_caching": False, **json.loads(sys.argv[2])}
    engine = LLM(model=sys.argv[1], **settings).llm_engine
    print(json.dumps({"about": f"vLLM {vllm.__version__}"}), file=answers, flush=True)
    for number, line in enumerate(sys.stdin):
        asked = json.loads(line)
        how = SamplingParams(temperature=0.0, max_tokens=asked["limit"], stop_token_ids=asked["ends"])
        began = first = time.perf_counter()
        engine.add_request(str(number), {"prompt_token_ids": asked["ids"]}, how)
        ids: list[int] = []
        passes = -1  # the first is prefill's
        while engine.has_unfinished_requests():
            for output in engine.step():
                ids = list(output.outputs[0].token_ids)
            if ids:
                passes += 1
                if not passes:
                    first = time.perf_counter()
        seconds = {"prefill": first - began, "decode": time.perf_counter() - first}
        print(json.dumps({"ids": ids, "passes": passes, **seconds}), file=answers, flush=True)


if __name__ == "__main__":
    main()
