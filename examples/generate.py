"""The shortest real program: the same answer plainly and with the draft head."""

import beagle

model = beagle.load("smollm2-135m", draft="auto")
question = "Explain photosynthesis to a child in four sentences."

plain = model.generate(question, max_new_tokens=128, draft=False, exact=True)
fast = model.generate(question, max_new_tokens=128, exact=True)

print(fast.text)
print(f"same tokens: {plain.token_ids == fast.token_ids}")
print(f"plain {plain.stats.tokens_per_second:.1f} token/s, Beagle {fast.stats.tokens_per_second:.1f} token/s")
print(f"acceptance length τ = {fast.stats.tau:.2f}")
