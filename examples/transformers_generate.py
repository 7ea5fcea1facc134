"""A script of transformers as it is, and the one line that lets it draft."""

import time

from transformers import AutoModelForCausalLM, AutoTokenizer

import beagle
from beagle.targets.loading import resolve

folder = resolve("smollm2-135m")  # any folder or hub id does
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
messages = [{"role": "user", "content": "Explain photosynthesis to a child in four sentences."}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def answer() -> list[int]:
    began = time.perf_counter()
    tokens = model.generate(**inputs, max_new_tokens=128, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    print(f"{len(tokens) / (time.perf_counter() - began):.1f} token/s")
    return tokens


plain = answer()
speculation = beagle.speculate(model, name="smollm2-135m")  # the one line
answer()  # the first call measures what passes cost on this machine, once
fast = answer()
print(tokenizer.decode(fast, skip_special_tokens=True))
print(f"same tokens: {plain == fast}, acceptance length τ = {speculation.stats.tau:.2f}")
