// The largest output of a product, for CPUs, without reading all of its bf16 weight.
//
// An int8 weight beside it takes two thirds of the bytes and gives every output within a bound: what int8 leaves of an
// output's weights, times the size of the vector. Outputs that can't be the largest within their bounds are left out, the others
// computed from the bf16 weight. So what is found has the bits of the whole product, and it is the first place of the largest.

#pragma once

#include <limits>
#include <utility>
#include <vector>

#include "choice.h"
#include "layers.h"

namespace {

// How far rounding takes an output from what int8 says, as a share of it: both are bf16, which is off by 1 / 256 at most.
constexpr float ROUNDING = 0.01f;

float size_of(const bf16* x, int64_t n) {
  __m512 squares = _mm512_setzero_ps();
  for (int64_t k = 0; k < n; k += 16) {
    const __m512 some = Whole::load(x + k);
    squares = _mm512_fmadd_ps(some, some, squares);
  }
  return std::sqrt(_mm512_reduce_add_ps(squares));
}

// How far an output may be from what its weights in int8 say, of a vector of size 1; `rest` is the size of what they leave.
//
// Besides, sums in fp32 are off by 2^-24 a step at most; vectors in int8 by half a fine step, 1 / (2 * FINE) of a coarse one,
// which is a 127th of their largest entry. A hundredth more is what rounding takes of all that.
float bound_of(const bf16* row, int64_t in, float rest) {
  const float others = in * 0x1p-23f + std::sqrt(float(in)) / (127 * 2 * FINE) * 1.02f;
  return 1.01f * (rest + others * (size_of(row, in) + rest));
}

// Which outputs of one row may be its largest, as one thread sees them.
class Shortlist {
 public:
  // Some outputs of a pair of blocks: what int8 says, and what it leaves of a vector of size 1.
  void see(const bf16* near, const float* left, int64_t n, float size, int64_t pair) {
    for (int64_t k = 0; k < n; k += 16) {
      const __m512 x = Whole::load(near + k);
      const __m512 bound = _mm512_fmadd_ps(_mm512_abs_ps(x), _mm512_set1_ps(ROUNDING),
                                           _mm512_mul_ps(_mm512_loadu_ps(left + k), _mm512_set1_ps(size)));
      const __m512 high = _mm512_add_ps(x, bound), low = _mm512_sub_ps(x, bound);
      const __mmask16 may = _mm512_cmp_ps_mask(high, _mm512_set1_ps(least), _CMP_NLT_UQ);  // NaN may
      if (!may) continue;
      const bool none = _mm512_cmp_ps_mask(high, high, _CMP_UNORD_Q);
      pairs.push_back({none ? std::numeric_limits<float>::infinity() : _mm512_reduce_max_ps(high), pair});
      if (!none) least = std::max(least, _mm512_reduce_max_ps(low));
    }
  }

  // What the largest is at least.
  float at_least() const { return least; }

  // Marks the pairs that have outputs which may be as large as that.
  void mark(float largest, std::vector<char>& marks) const {
    for (const auto& [high, pair] : pairs)
      if (!(high < largest)) marks[pair] = 1;
  }

 private:
  float least = -std::numeric_limits<float>::infinity();
  std::vector<std::pair<float, int64_t>> pairs;  // with the most that one of their outputs can be
};

}  // namespace
