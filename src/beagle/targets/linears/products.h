// Products of a few vectors with a large int8 or int4 weight, for CPUs: y[m, :] = W x[m, :] + bias.
//
// Such a product is as fast as its weight can be read. An int8 weight lies in tiles (tiles.h) in the order of reading. What
// comes next is prefetched, since the hardware doesn't follow tile loads. Vectors are bf16; each becomes two vectors of int8,
// coarse and fine, see `quantized.py`. An output is summed in the same order whatever the number of vectors is.
//
// int4 weights lie in blocks of 16 outputs. 32 inputs of a block are 320 bytes: four lines of two fours of inputs, in the
// low and the high nibbles of [16 outputs][4 inputs], then scale and middle of each output in bf16. A weight is
// scale * (nibble - 8) + middle. Vectors become int8 there, in groups of 32 inputs with a scale each; a group's sums are
// whole numbers, which its two scales multiply in fp32.
//
// Where the CPU has AMX, 8 vectors cost what one does beside int8 weights; else VNNI multiplies.

#pragma once

#include <cmath>

#include "half.h"

namespace {

constexpr int64_t GROUP = 320;  // bytes of 32 inputs of 16 outputs in int4
constexpr int64_t STEPS_AHEAD = 2;  // of int8 tiles that are prefetched: 64 inputs of a pair of blocks
constexpr float FINE = 254;     // steps of the fine vector in one of the coarse one

// Vectors as whole numbers, x = scale * (coarse + fine / FINE), in groups of up to 8: their coarse ones, their fine ones.
struct Whole {
  Lined<int8_t> bytes;
  Lined<float> scales;

  void make_room(int64_t rows, int64_t in) {
    if (bytes.size() < size_t(2 * rows * in)) bytes.resize(2 * rows * in);
    if (scales.size() < size_t(rows)) scales.resize(rows);
  }

  // Some of the rows.
  void of(const bf16* x, int64_t rows, int64_t in, int64_t from, int64_t to) {
    x += from * in;
    for (int64_t m = from; m < to; m++, x += in) {
      __m512i most = _mm512_setzero_si512();
      for (int64_t k = 0; k < in; k += 16) most = _mm512_max_epi32(most, size(load(x + k)));
      scales[m] = step_of(most);
      const __m512 scale = _mm512_set1_ps(scales[m]);
      const int64_t first = m / 8 * 8, size = std::min<int64_t>(rows - first, 8);
      int8_t *coarse = &bytes[(first + m) * in], *fine = coarse + size * in;
      for (int64_t k = 0; k < in; k += 16) {
        const __m512 steps = _mm512_div_ps(load(x + k), scale);
        const __m512i whole = _mm512_cvtps_epi32(steps);
        const __m512 rest = _mm512_mul_ps(_mm512_sub_ps(steps, _mm512_cvtepi32_ps(whole)), _mm512_set1_ps(FINE));
        store(coarse + k, whole);
        store(fine + k, _mm512_cvtps_epi32(rest));
      }
    }
  }

  // Sizes of numbers as whole numbers that have the same order, NaN above all others.
  static __m512i size(__m512 x) { return _mm512_castps_si512(_mm512_abs_ps(x)); }

  // For vectors with such largest sizes; NaN where one of them is, and so is what is multiplied with it.
  static float step_of(__m512i most) {
    const int32_t bits = _mm512_reduce_max_epi32(most);
    float largest;
    std::memcpy(&largest, &bits, 4);
    return std::max(largest, 1e-12f) / 127;
  }

  static __m512 load(const bf16* x) {
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
  }

  static void store(int8_t* to, __m512i whole) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(whole));
  }
};

// An output's weights in int8, in the tiles of its block, with their scale and sum; the size of what they leave.
float pack_int8(const bf16* row, int64_t output, int64_t in, int8_t* tiles, float* scale, int32_t* sum) {
  __m512i most = _mm512_setzero_si512(), total = most;
  for (int64_t k = 0; k < in; k += 16) most = _mm512_max_epi32(most, Whole::size(Whole::load(row + k)));
  *scale = Whole::step_of(most);
  const __m512 step = _mm512_set1_ps(*scale);
  __m512 squares = _mm512_setzero_ps();
  int8_t* to = tiles + output / OUT * OUT * in + output % OUT * 4;  // in every line four inputs of the output
  for (int64_t k = 0; k < in; k += 16) {
    const __m512 exact = Whole::load(row + k);
    const __m512i whole = _mm512_cvtps_epi32(_mm512_div_ps(exact, step));
    const __m512 rest = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(whole), step, exact);
    total = _mm512_add_epi32(total, whole);
    squares = _mm512_fmadd_ps(rest, rest, squares);
    alignas(16) int8_t bytes[16];
    Whole::store(bytes, whole);
    for (int64_t i = 0; i < 16; i += 4) std::memcpy(to + (k + i) * OUT, bytes + i, 4);
  }
  *sum = _mm512_reduce_add_epi32(total);
  return std::sqrt(_mm512_reduce_add_ps(squares));
}

// 16 outputs of one vector from its sums.
void finish(bf16* y, __m512i coarse, __m512i fine, const float* scales, float scale, const bf16* bias) {
  __m512 sums = _mm512_fmadd_ps(_mm512_cvtepi32_ps(fine), _mm512_set1_ps(1 / FINE), _mm512_cvtepi32_ps(coarse));
  sums = _mm512_mul_ps(_mm512_mul_ps(sums, _mm512_loadu_ps(scales)), _mm512_set1_ps(scale));
  store(y, sums, bias);
}

// A block of 16 outputs of R vectors; VNNI multiplies bytes without a sign, so 128 times the weights' sums go off.
template <int R>
void vnni_rows(const int8_t* w, const Whole& x, int64_t from, bf16* y, const float* scales, const int32_t* weight_sums,
               const bf16* bias, int64_t in, int64_t out) {
  const int8_t* bytes = &x.bytes[2 * from * in];
  __m512i coarse[R], fine[R];
  const __m512i off = _mm512_slli_epi32(_mm512_loadu_si512(weight_sums), 7);
  for (int m = 0; m < R; m++) coarse[m] = fine[m] = _mm512_sub_epi32(_mm512_setzero_si512(), off);
  const __m512i sign = _mm512_set1_epi8(int8_t(0x80));
  for (int64_t k = 0; k < in; k += 4) {
    const int8_t* p = w + k * OUT;
    prefetch(p);
    const __m512i weights = _mm512_loadu_si512(p);
    for (int m = 0; m < R; m++) {
      int32_t four;
      std::memcpy(&four, bytes + m * in + k, 4);
      coarse[m] = _mm512_dpbusd_epi32(coarse[m], _mm512_xor_si512(_mm512_set1_epi32(four), sign), weights);
      std::memcpy(&four, bytes + (R + m) * in + k, 4);
      fine[m] = _mm512_dpbusd_epi32(fine[m], _mm512_xor_si512(_mm512_set1_epi32(four), sign), weights);
    }
  }
  for (int m = 0; m < R; m++) finish(y + m * out, coarse[m], fine[m], scales, x.scales[from + m], bias);
}

void vnni(const int8_t* w, const Whole& x, bf16* y, const float* scales, const int32_t* sums, const bf16* bias,
          int64_t rows, int64_t in, int64_t out) {
  for (int64_t from = 0; from < rows; from += 8, y += 8 * out) switch (std::min<int64_t>(rows - from, 8)) {
      case 1: vnni_rows<1>(w, x, from, y, scales, sums, bias, in, out); break;
      case 2: vnni_rows<2>(w, x, from, y, scales, sums, bias, in, out); break;
      case 3: vnni_rows<3>(w, x, from, y, scales, sums, bias, in, out); break;
      case 4: vnni_rows<4>(w, x, from, y, scales, sums, bias, in, out); break;
      case 5: vnni_rows<5>(w, x, from, y, scales, sums, bias, in, out); break;
      case 6: vnni_rows<6>(w, x, from, y, scales, sums, bias, in, out); break;
      case 7: vnni_rows<7>(w, x, from, y, scales, sums, bias, in, out); break;
      default: vnni_rows<8>(w, x, from, y, scales, sums, bias, in, out);
    }
}

// Vectors in groups of inputs, as int8 with a scale each.
struct Groups {
  Lined<int8_t> bytes;         // [rows][in]
  Lined<float> scales, sums;  // [rows][in / IN], of sums the scale times that of a group's bytes

  void make_room(int64_t rows, int64_t in) {
    if (bytes.size() < size_t(rows * in)) bytes.resize(rows * in);
    if (scales.size() < size_t(rows * in / IN)) scales.resize(rows * in / IN);
    if (sums.size() < scales.size()) sums.resize(scales.size());
  }

  // Some of the rows.
  void of(const bf16* x, int64_t in, int64_t first_row, int64_t last_row) {
    x += first_row * in;
    int8_t* to = bytes.data() + first_row * in;
    for (int64_t g = first_row * in / IN; g < last_row * in / IN; g++, x += IN, to += IN) {
      const __m512 low = Whole::load(x), high = Whole::load(x + 16);
      scales[g] = Whole::step_of(_mm512_max_epi32(Whole::size(low), Whole::size(high)));
      const __m512 steps = _mm512_set1_ps(1 / scales[g]);
      const __m512i first = _mm512_cvtps_epi32(_mm512_mul_ps(low, steps));
      const __m512i second = _mm512_cvtps_epi32(_mm512_mul_ps(high, steps));
      Whole::store(to, first);
      Whole::store(to + 16, second);
      sums[g] = scales[g] * float(_mm512_reduce_add_epi32(_mm512_add_epi32(first, second)));
    }
  }
};

// Two fours of inputs of 16 outputs from a line.
void unpack(const uint8_t* line, __m512i* out) {
  const __m512i both = _mm512_loadu_si512(line), nibble = _mm512_set1_epi8(15);
  out[0] = _mm512_and_si512(both, nibble);
  out[1] = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
}

// Scales of a group's 16 outputs, and what 0 stands for.
struct Steps {
  __m512 scales, lowest;

  void of(const uint8_t* group) {
    const __m512i both = _mm512_loadu_si512(group + GROUP - 64);
    scales = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    lowest = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(int(0xffff0000))));
    lowest = _mm512_fnmadd_ps(_mm512_set1_ps(8), scales, lowest);
  }

  // The sums of a vector with a group's added.
  __m512 add(__m512 sums, __m512i of_bytes, float scale, float of_inputs) const {
    const __m512 steps = _mm512_mul_ps(scales, _mm512_set1_ps(scale));
    return _mm512_fmadd_ps(steps, _mm512_cvtepi32_ps(of_bytes), _mm512_fmadd_ps(lowest, _mm512_set1_ps(of_inputs), sums));
  }
};

// A block of 16 outputs of R vectors.
template <int R>
void int4_rows(const uint8_t* w, const Groups& x, int64_t from, bf16* y, const bf16* bias, int64_t in, int64_t out) {
  const int8_t* bytes = &x.bytes[from * in];
  const float *scales = &x.scales[from * in / IN], *of_inputs = &x.sums[from * in / IN];
  const int64_t groups = in / IN;
  __m512 sums[R];
  for (auto& sum : sums) sum = _mm512_setzero_ps();
  for (int64_t g = 0; g < groups; g++, w += GROUP) {
    __m512i of_bytes[R];
    for (auto& sum : of_bytes) sum = _mm512_setzero_si512();
    for (int i = 0; i < 4; i++) {
      __m512i weights[2];
      prefetch_far(w + 64 * i);
      unpack(w + 64 * i, weights);
      for (int j = 0; j < 2; j++)
        for (int m = 0; m < R; m++) {
          int32_t four;
          std::memcpy(&four, bytes + m * in + g * IN + 8 * i + 4 * j, 4);
          of_bytes[m] = _mm512_dpbusd_epi32(of_bytes[m], weights[j], _mm512_set1_epi32(four));
        }
    }
    prefetch_far(w + GROUP - 64);
    Steps steps;
    steps.of(w);
    for (int m = 0; m < R; m++) sums[m] = steps.add(sums[m], of_bytes[m], scales[m * groups + g], of_inputs[m * groups + g]);
  }
  for (int m = 0; m < R; m++) store(y + m * out, sums[m], bias);
}

void int4(const uint8_t* w, const Groups& x, bf16* y, const bf16* bias, int64_t rows, int64_t in, int64_t out) {
  for (int64_t from = 0; from < rows; from += 12, y += 12 * out) switch (std::min<int64_t>(rows - from, 12)) {
      case 1: int4_rows<1>(w, x, from, y, bias, in, out); break;
      case 2: int4_rows<2>(w, x, from, y, bias, in, out); break;
      case 3: int4_rows<3>(w, x, from, y, bias, in, out); break;
      case 4: int4_rows<4>(w, x, from, y, bias, in, out); break;
      case 5: int4_rows<5>(w, x, from, y, bias, in, out); break;
      case 6: int4_rows<6>(w, x, from, y, bias, in, out); break;
      case 7: int4_rows<7>(w, x, from, y, bias, in, out); break;
      case 8: int4_rows<8>(w, x, from, y, bias, in, out); break;
      case 9: int4_rows<9>(w, x, from, y, bias, in, out); break;
      case 10: int4_rows<10>(w, x, from, y, bias, in, out); break;
      case 11: int4_rows<11>(w, x, from, y, bias, in, out); break;
      default: int4_rows<12>(w, x, from, y, bias, in, out);
    }
}

#ifdef __AMX_BF16__

// What a pair of blocks, or a last one, reads some steps behind a place; at its end the next pair's beginning.
const int8_t* next_tile(const int8_t* w, int64_t k, int64_t in, bool both) {
  k += STEPS_AHEAD * 2 * IN;
  return k < in ? w + k * OUT : w + (k - in + (both ? 2 : 1) * in) * OUT;
}

// As `tiles`; MORE: over 8 vectors, up to 16.
template <bool BOTH, bool MORE>
void whole_tiles(const int8_t* w, const Whole& x, int64_t from, bf16* y, const float* scales, const bf16* bias,
                 int64_t rows, int64_t in, int64_t out) {
  const int8_t *bytes = &x.bytes[2 * from * in], *second = w + in * OUT;
  written();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < in; k += 2 * IN) {
    const int8_t* ahead = next_tile(w, k, in, BOTH);
    prefetch_tile(ahead);
    if (BOTH) prefetch_tile(ahead + in * OUT);
    _tile_loadd(4, bytes + k, in);
    if (MORE) _tile_loadd(5, bytes + 16 * in + k, in);
    _tile_loadd(6, w + k * OUT, 64);
    _tile_dpbssd(0, 4, 6);
    if (MORE) _tile_dpbssd(1, 5, 6);
    if (BOTH) {
      _tile_loadd(7, second + k * OUT, 64);
      _tile_dpbssd(2, 4, 7);
      if (MORE) _tile_dpbssd(3, 5, 7);
    }
  }
  alignas(64) int32_t sums[4][16][16];
  _tile_stored(0, sums[0], 64);
  if (MORE) _tile_stored(1, sums[1], 64);
  if (BOTH) _tile_stored(2, sums[2], 64);
  if (BOTH && MORE) _tile_stored(3, sums[3], 64);
  for (int j = 0; j < 1 + BOTH; j++)
    for (int64_t m = 0; m < rows; m++) {
      const int64_t group = m / 8, size = std::min<int64_t>(rows - 8 * group, 8);
      const auto& own = sums[2 * j + group];
      finish(y + m * out + j * OUT, _mm512_load_si512(own[m % 8]), _mm512_load_si512(own[m % 8 + size]),
             scales + j * OUT, x.scales[from + m], bias ? bias + j * OUT : nullptr);
    }
}

#endif

// As `multiply_pair`, for int4 weights: a group's sums end too soon for AMX to pay.
void multiply_pair_int4(const uint8_t* w, int64_t pair, const Groups& x, bf16* y, const bf16* bias, int64_t rows, int64_t in,
                        int64_t out, int64_t stride) {
  for (int64_t b = 2 * pair; b < std::min(2 * pair + 2, out / OUT); b++, y += OUT)
    int4(w + b * in / IN * GROUP, x, y, bias ? bias + b * OUT : nullptr, rows, in, stride);
}

// As `multiply_pair`, for int8 weights.
void multiply_pair_int8(Shaped& shaped, const int8_t* w, int64_t pair, const Whole& x, bf16* y, const float* scales,
                        const int32_t* sums, const bf16* bias, int64_t rows, int64_t in, int64_t out, int64_t stride) {
  const int64_t block = 2 * pair;
  const bool both = out / OUT - block > 1;
  w += block * in * OUT;
  scales += block * OUT;
  sums += block * OUT;
  if (bias) bias += block * OUT;
#ifdef __AMX_BF16__
  if (has_tiles()) {
    for (int64_t m = 0; m < rows; m += 16) {
      const int64_t some = std::min<int64_t>(rows - m, 16);
      shaped.of(2 * std::min<int64_t>(some, 8), some > 8 ? 2 * (some - 8) : 1);
      auto run = some > 8 ? (both ? whole_tiles<true, true> : whole_tiles<false, true>)
                          : (both ? whole_tiles<true, false> : whole_tiles<false, false>);
      run(w, x, m, y + m * stride, scales, bias, some, in, stride);
    }
    return;
  }
#endif
  for (int j = 0; j < 1 + both; j++)
    vnni(w + j * in * OUT, x, y + j * OUT, scales + j * OUT, sums + j * OUT, bias ? bias + j * OUT : nullptr, rows, in, stride);
}

}  // namespace
