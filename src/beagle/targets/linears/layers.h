// What layers do with few tokens besides products and attention: norms, RoPE, activations; and how threads share it.

#pragma once

#include <atomic>
#include <memory>
#include <thread>

#include "attention.h"

namespace {

using Rows = Lined<float>;
using Halves = Lined<bf16>;

struct Range {
  int64_t from, to;
};

// Blocks of 16 outputs are read in pairs.
int64_t pairs_of(int64_t out) { return (out / OUT + 1) / 2; }

Range outputs_of(Range pairs, int64_t out) { return {std::min(2 * OUT * pairs.from, out), std::min(2 * OUT * pairs.to, out)}; }

struct Thread {
  int64_t i, n;

  Range of(int64_t count) const { return {count * i / n, count * (i + 1) / n}; }

  // Outputs of a product.
  Range outputs(int64_t out) const { return outputs_of(of(pairs_of(out)), out); }
};

// Pairs of blocks that threads take one by one: first their own share, then what others have left. Cores are not equally fast
// where others use their memory or their time.
class Shares {
 public:
  explicit Shares(int64_t threads) : left(new Left[threads]) {}

  // All threads come to this as often; between two times they meet.
  template <typename Work>
  void each(int64_t pairs, const Thread& own, const Work& work) {
    const int64_t turn = left[own.i].turn++ % 2;
    left[own.i].next[1 - turn].store(0, std::memory_order_relaxed);
    for (int64_t i = 0; i < own.n; i++) {
      const Thread other{(own.i + i) % own.n, own.n};
      const Range range = other.of(pairs);
      for (int64_t k; (k = range.from + left[other.i].next[turn].fetch_add(1, std::memory_order_relaxed)) < range.to;) work(k);
    }
  }

 private:
  struct alignas(LINE) Left {
    std::atomic<int64_t> next[2] = {};  // this time's, and the next one's
    int64_t turn = 0;
  };
  std::unique_ptr<Left[]> left;
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

  // A pair of blocks of a product's outputs; y points to the first of them, rows are `stride` apart. Which outputs those are.
  Range multiply(Shaped& shaped, const Matrix& m, int64_t pair, const bf16* x, int64_t rows, bf16* y, int64_t stride) const {
    if (m.kind == HALF) multiply_pair(shaped, HalfWeight(m.weight, m.in, m.out), pair, x, y, m.bias, rows, m.in, m.out, stride);
    if (m.kind == INT8)
      multiply_pair_int8(shaped, static_cast<const int8_t*>(m.weight), pair, whole, y, m.scales, m.sums, m.bias, rows, m.in,
                         m.out, stride);
    if (m.kind == INT4)
      multiply_pair_int4(static_cast<const uint8_t*>(m.weight), pair, groups, y, m.bias, rows, m.in, m.out, stride);
    return outputs_of({pair, pair + 1}, m.out);
  }

  // The same in place, y [rows, out].
  Range multiply(Shaped& shaped, const Matrix& m, int64_t pair, const bf16* x, int64_t rows, bf16* y) const {
    return multiply(shaped, m, pair, x, rows, y + 2 * OUT * pair, m.out);
  }

  // A thread's share of them.
  Range multiply(const Matrix& m, const bf16* x, int64_t rows, bf16* y, const Thread& own) const {
    Shaped shaped;
    const Range pairs = own.of(pairs_of(m.out));
    for (int64_t pair = pairs.from; pair < pairs.to; pair++) multiply(shaped, m, pair, x, rows, y);
    return outputs_of(pairs, m.out);
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
