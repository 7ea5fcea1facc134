// Which token of a row of bf16 logits is chosen, for CPUs: the largest, or the largest with Gumbel noise.
//
// Noise is -log(-log(1 - u)), where u is the number of a token that SplitMix64 makes from a key. 16 at a time are computed by
// the same code wherever they are asked for, so a token has the same bits beside any others.

#pragma once

#include <cmath>
#include <limits>

#include "tiles.h"

namespace {

// 16 numbers of a row from k on, of which n - k may be fewer; the rest are minus infinity.
__m512 some_of(const bf16* row, int64_t k, int64_t n) {
  const __mmask16 there = n - k < 16 ? (1 << (n - k)) - 1 : 0xffff;
  const __m256i halves = _mm256_mask_loadu_epi16(_mm256_set1_epi16(int16_t(0xff80)), there, row + k);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

struct Largest {
  float value;    // NaN if one of the row is
  int64_t place;  // the first where it is
};

// Finds the largest of a row whose numbers come in any order.
class Search {
 public:
  // 16 more, whose places begin at one.
  void see(__m512 x, int64_t from) {
    if (!_mm512_cmp_ps_mask(x, most, _CMP_NLT_UQ)) return;  // NaN is no less
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    none |= _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    take(x, _mm512_add_epi32(_mm512_set1_epi32(int32_t(from)), lanes));
  }

  void see(const Search& other) {
    none |= other.none;
    take(other.most, other.places);
  }

  Largest found(int64_t n) const {
    const float largest = _mm512_reduce_max_ps(most);
    const __mmask16 there = _mm512_cmp_ps_mask(most, _mm512_set1_ps(largest), _CMP_EQ_OQ);
    const int64_t place = std::min(int64_t(_mm512_mask_reduce_min_epi32(there, places)), n - 1);
    return {none ? std::numeric_limits<float>::quiet_NaN() : largest, place};
  }

 private:
  __m512 most = _mm512_set1_ps(-std::numeric_limits<float>::infinity());  // by lanes
  __m512i places = _mm512_set1_epi32(std::numeric_limits<int32_t>::max());
  __mmask16 none = 0;  // no numbers

  void take(__m512 x, __m512i at) {
    const __mmask16 before = _mm512_mask_cmplt_epi32_mask(_mm512_cmp_ps_mask(x, most, _CMP_EQ_OQ), at, places);
    const __mmask16 better = _mm512_cmp_ps_mask(x, most, _CMP_GT_OQ) | before;
    most = _mm512_mask_mov_ps(most, better, x);
    places = _mm512_mask_mov_epi32(places, better, at);
  }
};

Largest largest_of(const bf16* row, int64_t n) {
  Search search;
  for (int64_t k = 0; k < n; k += 16) search.see(some_of(row, k, n), k);
  return search.found(n);
}

constexpr int64_t STEP = int64_t(0x9E3779B97F4A7C15);  // of SplitMix64's state, from token to token

// The states of 8 tokens.
__m512i states(int64_t key, __m512i tokens) {
  return _mm512_add_epi64(_mm512_mullo_epi64(tokens, _mm512_set1_epi64(STEP)), _mm512_set1_epi64(int64_t(uint64_t(key) + STEP)));
}

// The numbers that SplitMix64 makes of 8 states, as far as 63 bits go.
__m512i mixed(__m512i z) {
  z = _mm512_xor_si512(z, _mm512_srli_epi64(z, 30));
  z = _mm512_mullo_epi64(z, _mm512_set1_epi64(int64_t(0xBF58476D1CE4E5B9)));
  z = _mm512_xor_si512(z, _mm512_srli_epi64(z, 27));
  z = _mm512_mullo_epi64(z, _mm512_set1_epi64(int64_t(0x94D049BB133111EB)));
  z = _mm512_xor_si512(z, _mm512_srli_epi64(z, 31));
  return _mm512_and_si512(z, _mm512_set1_epi64(std::numeric_limits<int64_t>::max()));
}

// u of 16 states, from 2^-64 to 1 - 2^-24.
__m512 uniform(__m512i first, __m512i second) {
  const __m256 low = _mm512_cvtepi64_ps(mixed(first)), high = _mm512_cvtepi64_ps(mixed(second));
  const __m512 u = _mm512_mul_ps(_mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1), _mm512_set1_ps(0x1p-63f));
  return _mm512_min_ps(_mm512_max_ps(u, _mm512_set1_ps(0x1p-64f)), _mm512_set1_ps(1 - 0x1p-24f));
}

// log(1 + f) + e log 2 for f from -0.25 to 0.5: f + f^2 p(f), p within 1e-8 of the sum; its odd powers beside its even ones.
__m512 log_of(__m512 f, __m512 e) {
  constexpr float p[] = {-0.5f, 0.3333345055580139f, -0.2500009536743164f, 0.19990861415863037f, -0.1664731204509735f,
                         0.14478394389152527f, -0.13161195814609528f, 0.10463032126426697f, -0.045074887573719025f};
  const __m512 square = _mm512_mul_ps(f, f);
  __m512 even = _mm512_set1_ps(p[8]), odd = _mm512_set1_ps(p[7]);
  for (int i = 6; i > 0; i -= 2) {
    even = _mm512_fmadd_ps(even, square, _mm512_set1_ps(p[i]));
    odd = _mm512_fmadd_ps(odd, square, _mm512_set1_ps(p[i - 1]));
  }
  const __m512 sum = _mm512_fmadd_ps(odd, f, _mm512_fmadd_ps(even, square, _mm512_set1_ps(p[0])));
  return _mm512_fmadd_ps(e, _mm512_set1_ps(0.693147180559945f), _mm512_fmadd_ps(sum, square, f));
}

// e where x is from 0.75 to 1.5 times 2^e, or so.
__m512 exponent(__m512 x) { return _mm512_getexp_ps(_mm512_mul_ps(x, _mm512_set1_ps(4 / 3.f))); }

// Noise of u. What 1 - u rounds off is not lost: in the winners' tail, where u is small, f is -u itself.
__m512 gumbel_of(__m512 u) {
  const __m512 one = _mm512_set1_ps(1), zero = _mm512_setzero_ps();
  __m512 e = exponent(_mm512_sub_ps(one, u));
  const __m512 scale = _mm512_scalef_ps(one, _mm512_sub_ps(zero, e));
  const __m512 x = _mm512_sub_ps(zero, log_of(_mm512_fnmadd_ps(u, scale, _mm512_sub_ps(scale, one)), e));
  e = exponent(x);
  return _mm512_sub_ps(zero, log_of(_mm512_sub_ps(_mm512_scalef_ps(x, _mm512_sub_ps(zero, e)), one), e));
}

// Noise of each of the tokens with one key.
void fill_noise(int64_t key, const int64_t* tokens, float* out, int64_t n) {
  for (int64_t k = 0; k < n; k += 16) {
    const __mmask16 there = n - k < 16 ? (1 << (n - k)) - 1 : 0xffff;
    const __m512i first = _mm512_maskz_loadu_epi64(__mmask8(there), tokens + k);
    const __m512i second = _mm512_maskz_loadu_epi64(__mmask8(there >> 8), tokens + k + 8);
    _mm512_mask_storeu_ps(out + k, there, gumbel_of(uniform(states(key, first), states(key, second))));
  }
}

// The first place of the largest (logit - the largest logit) / temperature + noise in fp64, and the largest logit.
//
// Few tokens need their noise: it is at most -log u, so a token that beats the best has a u below e^(s - best), s being what
// the noise is added to. The bits of u as a whole number are not above its logarithm in their units.
Largest drawn(const bf16* row, int64_t n, int64_t key, double temperature) {
  const Largest likeliest = largest_of(row, n);
  if (!std::isfinite(likeliest.value)) return likeliest;
  const double steep = temperature < 1e30 ? std::min(M_LOG2E / temperature, 1e30) : 0;  // 0: differences may overflow
  const __m512 most = _mm512_set1_ps(likeliest.value), slope = _mm512_set1_ps(float(steep));
  alignas(64) float logits[16], noise[16];
  fill_noise(key, &likeliest.place, noise, 1);
  double best = noise[0];
  int64_t place = likeliest.place;
  __m512 above = _mm512_set1_ps(float(0.01 - best * M_LOG2E));  // 0.01 is more than rounding takes
  __m512i first = states(key, _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0));
  const __m512i eight = _mm512_set1_epi64(int64_t(8 * uint64_t(STEP)));
  for (int64_t k = 0; k < n; k += 16) {
    const __m512i second = _mm512_add_epi64(first, eight);
    const __m512 u = uniform(first, second), all = some_of(row, k, n);
    first = _mm512_add_epi64(second, eight);
    const __m512 bits = _mm512_cvtepi32_ps(_mm512_castps_si512(u));
    const __m512 least = _mm512_fmsub_ps(bits, _mm512_set1_ps(0x1p-23f), _mm512_set1_ps(127));  // log2 u or less
    const __m512 limit = _mm512_fmadd_ps(_mm512_sub_ps(all, most), slope, above);
    const __mmask16 can = _mm512_cmp_ps_mask(least, limit, _CMP_NGT_UQ);  // also where infinity times 0 is no number
    if (can == 0) continue;
    _mm512_store_ps(logits, all);
    _mm512_store_ps(noise, gumbel_of(u));
    for (int i = 0; i < 16; i++) {
      if (!(can >> i & 1)) continue;
      const double score = (double(logits[i]) - likeliest.value) / temperature + noise[i];
      if (score > best || (score == best && k + i < place)) best = score, place = k + i;
    }
    above = _mm512_set1_ps(float(0.01 - best * M_LOG2E));
  }
  return {likeliest.value, place};
}

}  // namespace
