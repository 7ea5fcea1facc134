// What layers do with few tokens besides products and attention: norms, RoPE, activations; and how threads share it.

#pragma once

#include <atomic>
#include <thread>

#include "attention.h"

namespace {

using Rows = Lined<float>;
using Halves = Lined<bf16>;

struct Range {
  int64_t from, to;
};

struct Thread {
  int64_t i, n;

  Range of(int64_t count) const { return {count * i / n, count * (i + 1) / n}; }

  // Outputs of a product: pairs of blocks, which are read together.
  Range outputs(int64_t out) const {
    const Range pairs = of((out / OUT + 1) / 2);
    return {std::min(2 * OUT * pairs.from, out), std::min(2 * OUT * pairs.to, out)};
  }
};

// Where the threads of a region wait for each other. They spin as long as an ordinary wait takes; longer ones come from a
// busy machine, where two of them may share a core: then the others go first.
class Meeting {
 public:
  void wait(const Thread& own) {
    const int64_t before = met.load(std::memory_order_acquire);
    if (came.fetch_add(1, std::memory_order_acq_rel) + 1 == own.n) {
      came.store(0, std::memory_order_relaxed);
      met.store(before + 1, std::memory_order_release);
      return;
    }
    for (int64_t spins = 0; met.load(std::memory_order_acquire) == before; spins++)
      if (spins < SPINS) _mm_pause();
      else std::this_thread::yield();
  }

 private:
  static constexpr int64_t SPINS = 1000;
  alignas(64) std::atomic<int64_t> came{0};
  alignas(64) std::atomic<int64_t> met{0};
};

enum Kind : int64_t { HALF, INT8, INT4 };

struct Matrix {
  const void* weight;   // [out, in] as its kind lies, see half.h, products.h
  const float* scales;  // [out], of int8
  const int32_t* sums;  // [out], of int8
  const bf16* bias;     // [out] or null
  int64_t in, out;
  Kind kind;
};

// What is multiplied with weights of a kind: rows, and what becomes of them.
class Inputs {
 public:
  void make_room(int64_t rows, int64_t in) {
    whole.make_room(rows, in);
    groups.make_room(rows, in);
  }

  // Some of the rows; x [rows, in].
  void take(Kind kind, const bf16* x, int64_t rows, int64_t in, Range some) {
    if (kind == INT8) whole.of(x, rows, in, some.from, some.to);
    if (kind == INT4) groups.of(x, in, some.from, some.to);
  }

  // A thread's share of the outputs of a product, y [rows, out].
  Range multiply(const Matrix& m, const bf16* x, int64_t rows, bf16* y, const Thread& own) const {
    const Range range = own.outputs(m.out);
    const int64_t from = range.from / OUT, to = range.to / OUT;
    if (m.kind == HALF) share(HalfWeight(m.weight, m.in, m.out), x, y, m.bias, rows, m.in, m.out, from, to);
    if (m.kind == INT8)
      share_whole(static_cast<const int8_t*>(m.weight), whole, y, m.scales, m.sums, m.bias, rows, m.in, m.out, from, to);
    if (m.kind == INT4) share_int4(static_cast<const uint8_t*>(m.weight), groups, y, m.bias, rows, m.in, m.out, from, to);
    return range;
  }

 private:
  Whole whole;
  Groups groups;
};

// The inputs of a thread that takes all rows for itself; they serve all weights of their kind until the next ones come.
const Inputs& taken(Kind kind, const bf16* x, int64_t rows, int64_t in) {
  thread_local Inputs inputs;
  inputs.make_room(rows, in);
  inputs.take(kind, x, rows, in, {0, rows});
  return inputs;
}

Range multiply(const Matrix& m, const bf16* x, int64_t rows, bf16* y, const Thread& own) {
  return taken(m.kind, x, rows, m.in).multiply(m, x, rows, y, own);
}

__m512 exponential(__m512 x) {
  x = _mm512_min_ps(_mm512_set1_ps(88), _mm512_max_ps(_mm512_set1_ps(-87), x));  // in this order NaN stays NaN
  const __m512 twos = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  const __m512 rest = _mm512_fnmadd_ps(twos, _mm512_set1_ps(0.693147181f), x);
  __m512 sum = _mm512_set1_ps(1.f / 120);
  for (float term : {1.f / 24, 1.f / 6, 1.f / 2, 1.f, 1.f}) sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(term));
  return _mm512_scalef_ps(sum, twos);
}

float scale_of(const float* x, int64_t n, double eps) {
  __m512 squares = _mm512_setzero_ps();
  for (int64_t k = 0; k < n; k += 16) squares = _mm512_fmadd_ps(_mm512_loadu_ps(x + k), _mm512_loadu_ps(x + k), squares);
  return 1 / std::sqrt(_mm512_reduce_add_ps(squares) / n + float(eps));
}

void widen(float* y, const bf16* x, int64_t n) {
  for (int64_t k = 0; k < n; k += 16) _mm512_storeu_ps(y + k, Whole::load(x + k));
}

// y = x * scale * weight
void normed(bf16* y, const float* x, const float* weight, float scale, int64_t n) {
  for (int64_t k = 0; k < n; k += 16)
    to_half(y + k, _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(x + k), _mm512_set1_ps(scale)), _mm512_loadu_ps(weight + k)));
}

// RoPE of a head.
void rotate(bf16* y, const bf16* x, const bf16* cos, const bf16* sin, int64_t n) {
  for (int64_t k = 0, half = n / 2; k < half; k += 16) {
    const __m512 a = Whole::load(x + k), b = Whole::load(x + half + k);
    to_half(y + k, _mm512_fnmadd_ps(b, Whole::load(sin + k), _mm512_mul_ps(a, Whole::load(cos + k))));
    to_half(y + half + k, _mm512_fmadd_ps(a, Whole::load(sin + half + k), _mm512_mul_ps(b, Whole::load(cos + half + k))));
  }
}

// gate = SiLU(gate) * up
void activate(bf16* gate, const bf16* up, int64_t n) {
  for (int64_t k = 0; k < n; k += 16) {
    const __m512 x = Whole::load(gate + k);
    const __m512 silu = _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1), exponential(_mm512_sub_ps(_mm512_setzero_ps(), x))));
    to_half(gate + k, _mm512_mul_ps(silu, Whole::load(up + k)));
  }
}

}  // namespace
