// Products of a few vectors with a large weight, for CPUs: y[m, :] = W x[m, :] + bias.
//
// Such a product is as fast as its weight can be read. The weight lies in tiles in the order of reading. A tile is
// 1 KiB: 16 outputs by 32 inputs of bf16, inputs in pairs, [16 pairs][16 outputs][2]; or 16 outputs by 64 inputs of
// int8, inputs in fours, [16 fours][16 outputs][4]. What comes next is prefetched, since the hardware doesn't follow
// tile loads. An output is summed in the same order whatever the number of vectors is.
//
// int4 weights lie in blocks of 16 outputs. 32 inputs of a block are 320 bytes: four lines of 16-bit words, whose four
// nibbles belong to four pairs of inputs, [4 lines][16 outputs][2 inputs][4 pairs], then scale and middle of each output
// in bf16. A weight is scale * (nibble - 8) + middle. Vectors multiply nibble - 8, which bf16 holds exactly; in fp32 the
// scale multiplies the group's sum, and the middle the sum of the group's inputs.
//
// Vectors are bf16. Beside int8 weights each becomes two vectors of int8, coarse and fine, see `quantized.py`.
//
// Where the CPU has AMX, 16 vectors cost what one does; elsewhere AVX-512 BF16 and VNNI multiply.


#pragma once

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

using bf16 = uint16_t;

constexpr int64_t OUT = 16, IN = 32;  // outputs and bf16 inputs of a tile
constexpr int64_t TILE = 1024;        // bytes
constexpr int64_t AHEAD = 2 * TILE;   // bytes that are prefetched ahead of their use
constexpr int64_t GROUP = 320;        // bytes of 32 inputs of 16 outputs in int4
constexpr float FINE = 254;           // steps of the fine vector in one of the coarse one

// 16 sums of one vector, with their bias, rounded to bf16.
void store(bf16* y, __m512 sums, const bf16* bias) {
  if (bias) {
    __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bias));
    sums = _mm512_add_ps(sums, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16)));
  }
  __m256bh out = _mm512_cvtneps_pbh(sums);
  std::memcpy(y, &out, 32);
}

void prefetch(const void* line) { _mm_prefetch(static_cast<const char*>(line) + AHEAD, _MM_HINT_T0); }

// For int4, whose weights are unpacked before they are multiplied: farther ahead, into the second cache.
void prefetch_far(const void* line) { _mm_prefetch(static_cast<const char*>(line) + 4 * AHEAD, _MM_HINT_T1); }

void prefetch_tile(const void* tile) {
  for (int64_t i = 0; i < TILE; i += 64) prefetch(static_cast<const char*>(tile) + i);
}

// B blocks of 16 outputs, of R vectors.
template <int R, int B>
void avx_rows(const bf16* w, const bf16* x, bf16* y, const bf16* bias, int64_t in, int64_t out) {
  __m512 sums[B][R];
  for (auto& block : sums)
    for (auto& sum : block) sum = _mm512_setzero_ps();
  for (int64_t k = 0; k < in; k += 2) {
    __m512bh weights[B];
    for (int j = 0; j < B; j++) {
      const bf16* p = w + j * in * OUT + k * OUT;
      prefetch(p);
      weights[j] = (__m512bh)_mm512_load_si512(p);
    }
    for (int m = 0; m < R; m++) {
      int32_t pair;
      std::memcpy(&pair, x + m * in + k, 4);
      const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
      for (int j = 0; j < B; j++) sums[j][m] = _mm512_dpbf16_ps(sums[j][m], weights[j], both);
    }
  }
  for (int j = 0; j < B; j++)
    for (int m = 0; m < R; m++) store(y + m * out + j * OUT, sums[j][m], bias ? bias + j * OUT : nullptr);
}

template <int B>
void avx(const bf16* w, const bf16* x, bf16* y, const bf16* bias, int64_t rows, int64_t in, int64_t out) {
  for (; rows > 0; rows -= 8, x += 8 * in, y += 8 * out) switch (std::min<int64_t>(rows, 8)) {
      case 1: avx_rows<1, B>(w, x, y, bias, in, out); break;
      case 2: avx_rows<2, B>(w, x, y, bias, in, out); break;
      case 3: avx_rows<3, B>(w, x, y, bias, in, out); break;
      case 4: avx_rows<4, B>(w, x, y, bias, in, out); break;
      case 5: avx_rows<5, B>(w, x, y, bias, in, out); break;
      case 6: avx_rows<6, B>(w, x, y, bias, in, out); break;
      case 7: avx_rows<7, B>(w, x, y, bias, in, out); break;
      default: avx_rows<8, B>(w, x, y, bias, in, out);
    }
}

// Vectors as whole numbers, x = scale * (coarse + fine / FINE), in groups of up to 8: their coarse ones, their fine ones.
struct Whole {
  std::vector<int8_t> bytes;
  std::vector<float> scales;

  void of(const bf16* x, int64_t rows, int64_t in) {
    if (bytes.size() < size_t(2 * rows * in)) bytes.resize(2 * rows * in);
    scales.resize(rows);
    for (int64_t m = 0; m < rows; m++, x += in) {
      __m512 most = _mm512_setzero_ps();
      for (int64_t k = 0; k < in; k += 16) most = _mm512_max_ps(most, _mm512_abs_ps(load(x + k)));
      scales[m] = std::max(_mm512_reduce_max_ps(most), 1e-12f) / 127;
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

  static __m512 load(const bf16* x) {
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
  }

  static void store(int8_t* to, __m512i whole) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(whole));
  }
};

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

// Sums of the inputs of each group of each vector, [rows][in / IN].
struct GroupSums {
  std::vector<float> sums;

  void of(const bf16* x, int64_t rows, int64_t in) {
    sums.resize(rows * in / IN);
    const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
    for (float& sum : sums) {
      const __m512bh inputs = (__m512bh)_mm512_loadu_si512(x);
      sum = _mm512_reduce_add_ps(_mm512_dpbf16_ps(_mm512_setzero_ps(), inputs, ones));
      x += IN;
    }
  }
};

// -8 … 7, twice: the low five bits of a word choose.
alignas(64) const bf16 WHOLE[32] = {
    0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
    0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
};

// Four pairs of inputs of 16 outputs from a line.
void unpack(const uint8_t* line, __m512i* out) {
  const __m512i words = _mm512_loadu_si512(line), whole = _mm512_load_si512(WHOLE);
  out[0] = _mm512_permutexvar_epi16(words, whole);
  out[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), whole);
  out[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 8), whole);
  out[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 12), whole);
}

// Scales and middles of a group's 16 outputs.
struct Steps {
  __m512 scales, middles;

  void of(const uint8_t* group) {
    const __m512i both = _mm512_loadu_si512(group + GROUP - 64);
    scales = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    middles = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(int(0xffff0000))));
  }

  // The sums of a vector with a group's added.
  __m512 add(__m512 sums, __m512 of_whole, float of_inputs) const {
    return _mm512_fmadd_ps(scales, of_whole, _mm512_fmadd_ps(middles, _mm512_set1_ps(of_inputs), sums));
  }
};

// A block of 16 outputs of R vectors.
template <int R>
void int4_rows(const uint8_t* w, const bf16* x, const float* group_sums, bf16* y, const bf16* bias, int64_t in,
               int64_t out) {
  __m512 sums[R];
  for (auto& sum : sums) sum = _mm512_setzero_ps();
  for (int64_t k = 0; k < in; k += IN, w += GROUP) {
    __m512 of_whole[R];
    for (auto& sum : of_whole) sum = _mm512_setzero_ps();
    for (int i = 0; i < 4; i++) {
      __m512i weights[4];
      prefetch_far(w + 64 * i);
      unpack(w + 64 * i, weights);
      for (int j = 0; j < 4; j++)
        for (int m = 0; m < R; m++) {
          int32_t pair;
          std::memcpy(&pair, x + m * in + k + 8 * i + 2 * j, 4);
          of_whole[m] = _mm512_dpbf16_ps(of_whole[m], (__m512bh)weights[j], (__m512bh)_mm512_set1_epi32(pair));
        }
    }
    prefetch_far(w + GROUP - 64);
    Steps steps;
    steps.of(w);
    for (int m = 0; m < R; m++) sums[m] = steps.add(sums[m], of_whole[m], group_sums[(m * in + k) / IN]);
  }
  for (int m = 0; m < R; m++) store(y + m * out, sums[m], bias);
}

void int4(const uint8_t* w, const bf16* x, const float* group_sums, bf16* y, const bf16* bias, int64_t rows, int64_t in,
          int64_t out) {
  for (; rows > 0; rows -= 8, x += 8 * in, group_sums += 8 * in / IN, y += 8 * out)
    switch (std::min<int64_t>(rows, 8)) {
      case 1: int4_rows<1>(w, x, group_sums, y, bias, in, out); break;
      case 2: int4_rows<2>(w, x, group_sums, y, bias, in, out); break;
      case 3: int4_rows<3>(w, x, group_sums, y, bias, in, out); break;
      case 4: int4_rows<4>(w, x, group_sums, y, bias, in, out); break;
      case 5: int4_rows<5>(w, x, group_sums, y, bias, in, out); break;
      case 6: int4_rows<6>(w, x, group_sums, y, bias, in, out); break;
      case 7: int4_rows<7>(w, x, group_sums, y, bias, in, out); break;
      default: int4_rows<8>(w, x, group_sums, y, bias, in, out);
    }
}

#ifdef __AMX_BF16__

// Linux lets a process use the tiles' registers only after it asked for them.
bool has_tiles() {
  static const bool asked = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
  return asked;
}

struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0 to 3 are sums, 4 and 5 vectors, 6 and 7 weights; 1, 3 and 5 belong to the second of two groups of vectors.
void shape_tiles(int64_t first, int64_t second) {
  TileShapes shapes;
  for (int i = 0; i < 8; i++) {
    shapes.rows[i] = i >= 6 ? 16 : (i & 1) ? second : first;
    shapes.bytes[i] = 64;
  }
  _tile_loadconfig(&shapes);
}

// BOTH: two blocks of 16 outputs, else one; MORE: over 16 vectors, up to 32.
template <bool BOTH, bool MORE>
void tiles(const bf16* w, const bf16* x, bf16* y, const bf16* bias, int64_t rows, int64_t in, int64_t out) {
  const bf16* second = w + in * OUT;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < in; k += IN) {
    prefetch_tile(w + k * OUT);
    _tile_loadd(4, x + k, in * 2);
    if (MORE) _tile_loadd(5, x + 16 * in + k, in * 2);
    _tile_loadd(6, w + k * OUT, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (MORE) _tile_dpbf16ps(1, 5, 6);
    if (BOTH) {
      prefetch_tile(second + k * OUT);
      _tile_loadd(7, second + k * OUT, 64);
      _tile_dpbf16ps(2, 4, 7);
      if (MORE) _tile_dpbf16ps(3, 5, 7);
    }
  }
  alignas(64) float sums[4][16][16];
  _tile_stored(0, sums[0], 64);
  if (MORE) _tile_stored(1, sums[1], 64);
  if (BOTH) _tile_stored(2, sums[2], 64);
  if (BOTH && MORE) _tile_stored(3, sums[3], 64);
  for (int j = 0; j < 1 + BOTH; j++)
    for (int64_t m = 0; m < rows; m++)
      store(y + m * out + j * OUT, _mm512_load_ps(sums[2 * j + m / 16][m % 16]), bias ? bias + j * OUT : nullptr);
}

// As `tiles`; MORE: over 8 vectors, up to 16.
template <bool BOTH, bool MORE>
void whole_tiles(const int8_t* w, const Whole& x, int64_t from, bf16* y, const float* scales, const bf16* bias,
                 int64_t rows, int64_t in, int64_t out) {
  const int8_t *bytes = &x.bytes[2 * from * in], *second = w + in * OUT;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < in; k += 2 * IN) {
    prefetch_tile(w + k * OUT);
    _tile_loadd(4, bytes + k, in);
    if (MORE) _tile_loadd(5, bytes + 16 * in + k, in);
    _tile_loadd(6, w + k * OUT, 64);
    _tile_dpbssd(0, 4, 6);
    if (MORE) _tile_dpbssd(1, 5, 6);
    if (BOTH) {
      prefetch_tile(second + k * OUT);
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

constexpr int64_t MOST = 64;  // vectors that share unpacked weights

// Adds two groups of 16 outputs of up to 16 vectors, or four, to their sums; the tiles are shaped for the vectors.
template <bool FOUR>
void add_groups(const uint8_t* w, const __m512i* weights, const bf16* x, const float* of_inputs, __m512* sums,
                int64_t rows, int64_t in) {
  constexpr int N = FOUR ? 4 : 2;
  alignas(64) __m512 of_whole[N][16];
  _tile_zero(0);
  _tile_loadd(4, x, in * 2);
  _tile_loadd(6, weights, 64);
  _tile_dpbf16ps(0, 4, 6);
  _tile_zero(1);
  _tile_loadd(5, x + IN, in * 2);
  _tile_loadd(7, weights + 16, 64);
  _tile_dpbf16ps(1, 5, 7);
  if (FOUR) {
    _tile_zero(2);
    _tile_loadd(4, x + 2 * IN, in * 2);
    _tile_loadd(6, weights + 32, 64);
    _tile_dpbf16ps(2, 4, 6);
    _tile_zero(3);
    _tile_loadd(5, x + 3 * IN, in * 2);
    _tile_loadd(7, weights + 48, 64);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, of_whole[0], 64);
  _tile_stored(1, of_whole[1], 64);
  if (FOUR) _tile_stored(2, of_whole[2], 64);
  if (FOUR) _tile_stored(3, of_whole[3], 64);
  Steps steps[N];
  for (int g = 0; g < N; g++) steps[g].of(w + g * GROUP);
  for (int64_t m = 0; m < rows; m++, of_inputs += in / IN) {
    __m512 sum = sums[m];
    for (int g = 0; g < N; g++) sum = steps[g].add(sum, of_whole[g][m], of_inputs[g]);
    sums[m] = sum;
  }
}

// A block of 16 outputs of up to MOST vectors; `shaped`: the vectors that the tiles are shaped for.
void int4_tiles(const uint8_t* w, const bf16* x, const float* of_inputs, bf16* y, const bf16* bias, int64_t rows,
                int64_t in, int64_t out, int64_t& shaped) {
  alignas(64) __m512i unpacked[2][4 * 16];
  alignas(64) __m512 sums[MOST];
  std::fill(sums, sums + rows, _mm512_setzero_ps());
  for (int64_t k = 0; k < in; k += 4 * IN, w += 4 * GROUP) {
    const bool four = in - k >= 4 * IN;
    __m512i* weights = unpacked[k / (4 * IN) % 2];  // in turns: fresh ones are not at hand at once
    for (int g = 0; g < (four ? 4 : 2); g++)
      for (int i = 0; i < 5; i++) {
        prefetch_far(w + g * GROUP + 64 * i);
        if (i < 4) unpack(w + g * GROUP + 64 * i, weights + 16 * g + 4 * i);
      }
    for (int64_t m = 0; m < rows; m += 16) {
      const int64_t some = std::min<int64_t>(rows - m, 16);
      if (some != shaped) shape_tiles(some, some);
      shaped = some;
      (four ? add_groups<true> : add_groups<false>)(w, weights, x + m * in + k, of_inputs + (m * in + k) / IN,
                                                    sums + m, some, in);
    }
  }
  for (int64_t m = 0; m < rows; m++) store(y + m * out, sums[m], bias);
}

#endif

// As `share`, for int4 weights.
void share_int4(const uint8_t* w, const bf16* x, const GroupSums& group_sums, bf16* y, const bf16* bias, int64_t rows,
                int64_t in, int64_t out, int64_t from, int64_t to) {
  int64_t shaped = 0;
  for (int64_t b = from; b < to; b++) {
    const uint8_t* weights = w + b * in / IN * GROUP;
    const bf16* added = bias ? bias + b * OUT : nullptr;
#ifdef __AMX_BF16__
    if (has_tiles()) {
      for (int64_t m = 0; m < rows; m += MOST)
        int4_tiles(weights, x + m * in, &group_sums.sums[m * in / IN], y + m * out + b * OUT, added,
                   std::min(rows - m, MOST), in, out, shaped);
      continue;
    }
#endif
    int4(weights, x, group_sums.sums.data(), y + b * OUT, added, rows, in, out);
  }
#ifdef __AMX_BF16__
  if (shaped) _tile_release();
#endif
}

// As `share`, for int8 weights.
void share_whole(const int8_t* w, const Whole& x, bf16* y, const float* scales, const int32_t* sums, const bf16* bias,
                 int64_t rows, int64_t in, int64_t out, int64_t from, int64_t to) {
  int64_t shaped = 0;
  for (int64_t b = from; b < to; b += 2) {
    const int8_t* weights = w + b * in * OUT;
    const bf16* added = bias ? bias + b * OUT : nullptr;
    const bool both = to - b > 1;
#ifdef __AMX_BF16__
    if (has_tiles()) {
      for (int64_t m = 0; m < rows; m += 16) {
        const int64_t some = std::min<int64_t>(rows - m, 16);
        if (some != shaped) shape_tiles(2 * std::min<int64_t>(some, 8), some > 8 ? 2 * (some - 8) : 1);
        shaped = some;
        auto run = some > 8 ? (both ? whole_tiles<true, true> : whole_tiles<false, true>)
                            : (both ? whole_tiles<true, false> : whole_tiles<false, false>);
        run(weights, x, m, y + m * out + b * OUT, scales + b * OUT, added, some, in, out);
      }
      continue;
    }
#endif
    for (int j = 0; j < 1 + both; j++)
      vnni(weights + j * in * OUT, x, y + (b + j) * OUT, scales + (b + j) * OUT, sums + (b + j) * OUT,
           added ? added + j * OUT : nullptr, rows, in, out);
  }
#ifdef __AMX_BF16__
  if (shaped) _tile_release();
#endif
}

// Blocks of 16 outputs, of one thread.
void share(const bf16* w, const bf16* x, bf16* y, const bf16* bias, int64_t rows, int64_t in, int64_t out, int64_t from,
           int64_t to) {
  int64_t shaped = 0;
  for (int64_t b = from; b < to; b += 2) {
    const bf16 *weights = w + b * in * OUT, *added = bias ? bias + b * OUT : nullptr;
    const bool both = to - b > 1;
#ifdef __AMX_BF16__
    if (has_tiles()) {
      for (int64_t m = 0; m < rows; m += 32) {  // the weights of two blocks stay in the cache
        const int64_t some = std::min<int64_t>(rows - m, 32);
        if (some != shaped) shape_tiles(std::min<int64_t>(some, 16), some > 16 ? some - 16 : 1);
        shaped = some;
        auto run = some > 16 ? (both ? tiles<true, true> : tiles<false, true>)
                             : (both ? tiles<true, false> : tiles<false, false>);
        run(weights, x + m * in, y + m * out + b * OUT, added, some, in, out);
      }
      continue;
    }
#endif
    (both ? avx<2> : avx<1>)(weights, x, y + b * OUT, added, rows, in, out);
  }
#ifdef __AMX_BF16__
  if (shaped) _tile_release();  // other libraries shape them for themselves
#endif
}

}  // namespace
