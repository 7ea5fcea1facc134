"""A script of transformers as it is, and the one line that lets it draft."""

import time

import beagle

# any model of AutoModelForCausalLM.from_pretrained does; this one needs no model hub
model, tokenizer = beagle.load_model("smollm2-135m", dtype="float32", device="cpu")
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
