// Products of a few vectors with a large bf16 weight, for CPUs: y[m, :] = W x[m, :] + bias.
//
// Such a product is as fast as its weight can be read, so a number of a weight takes 12 bits, and none is changed: its low
// byte as it is, and four bits for its high byte, which is a sign and most of an exponent. Trained weights have few of
// those. The 16 that a weight has most often are its table; a number with another one is a patch.
//
// A weight lies in the order of reading: pairs of blocks of 16 outputs, in each pair steps of 32 inputs, a step's two tiles
// (tiles.h) one after the other. A packed tile is four times 192 bytes, each of which makes four lines: a line of nibbles,
// low ones for the first two lines, and two lines of low bytes. Behind the tiles come the table, how many patches are before
// each pair's, and the patches.
//
// An output is summed in the same order whatever the number of vectors is. Where the CPU has AMX, 16 vectors cost what one
// does; else AVX-512 BF16 multiplies.

#pragma once

#include "tiles.h"

namespace {

constexpr int64_t PACKED = 768;  // bytes of a packed tile

struct Patch {
  uint32_t at;  // in its pair of blocks: tiles of 512 numbers
  uint32_t value;
};

struct HalfWeight {
  const uint8_t* tiles;
  __m512i table;          // four times
  const uint32_t* first;  // [pairs + 1]
  const Patch* patches;

  HalfWeight(const void* weight, int64_t in, int64_t out) : tiles(static_cast<const uint8_t*>(weight)) {
    const uint8_t* behind = tiles + in / IN * (out / OUT) * PACKED;
    table = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(behind)));
    first = reinterpret_cast<const uint32_t*>(behind + 16);
    patches = reinterpret_cast<const Patch*>(first + (out / OUT + 1) / 2 + 1);
  }
};

// Four lines of a tile.
void unpack_half(const uint8_t* packed, __m512i table, bf16* lines) {
  const __m512i nibble = _mm512_set1_epi8(15), both = _mm512_loadu_si512(packed);
  const __m512i places[2] = {_mm512_and_si512(both, nibble), _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble)};
  for (int i = 0; i < 2; i++) {
    const __m512i low = _mm512_loadu_si512(packed + 64 * (i + 1)), high = _mm512_shuffle_epi8(table, places[i]);
    _mm512_store_si512(lines + 64 * i, _mm512_unpacklo_epi8(low, high));
    _mm512_store_si512(lines + 64 * i + 32, _mm512_unpackhi_epi8(low, high));
  }
}

// The tiles of a pair of blocks, or of a last block alone, unpacked step by step.
template <int B>
class Unpacked {
 public:
  Unpacked(const HalfWeight& weight, int64_t block, int64_t in)
      : packed(weight.tiles + block * (in / IN) * PACKED), steps(in / IN), table(weight.table),
        patch(weight.patches + weight.first[block / 2]), end(weight.patches + weight.first[block / 2 + 1]) {}

  void step(int64_t s) {
    if (s == steps) return;
    bf16* to = tile(s, 0);
    for (int i = 0; i < 4 * B; i++, packed += PACKED / 4) {
      for (int line = 0; line < PACKED / 4; line += 64) prefetch_far(packed + line);
      unpack_half(packed, table, to + 128 * i);
    }
    for (const uint32_t from = uint32_t(512 * B * s); patch < end && patch->at < from + 512 * B; patch++)
      to[patch->at - from] = bf16(patch->value);
  }

  bf16* tile(int64_t s, int block) { return tiles[s % 2][block]; }

 private:
  alignas(64) bf16 tiles[2][B][512];  // the next step's are made while one's are multiplied
  const uint8_t* packed;
  const int64_t steps;
  const __m512i table;
  const Patch *patch, *end;
};

// B blocks of 16 outputs, of R vectors.
template <int R, int B>
void avx_rows(const HalfWeight& w, int64_t block, const bf16* x, bf16* y, const bf16* bias, int64_t in, int64_t out) {
  Unpacked<B> weights(w, block, in);
  __m512 sums[B][R];
  for (auto& of : sums)
    for (auto& sum : of) sum = _mm512_setzero_ps();
  for (int64_t s = 0; s < in / IN; s++, x += IN) {
    weights.step(s);
    for (int k = 0; k < IN; k += 2)
      for (int m = 0; m < R; m++) {
        int32_t pair;
        std::memcpy(&pair, x + m * in + k, 4);
        for (int j = 0; j < B; j++)
          sums[j][m] = _mm512_dpbf16_ps(sums[j][m], (__m512bh)_mm512_load_si512(weights.tile(s, j) + k * OUT),
                                        (__m512bh)_mm512_set1_epi32(pair));
      }
  }
  for (int j = 0; j < B; j++)
    for (int m = 0; m < R; m++) store(y + m * out + j * OUT, sums[j][m], bias ? bias + j * OUT : nullptr);
}

template <int B>
void avx(const HalfWeight& w, int64_t block, const bf16* x, bf16* y, const bf16* bias, int64_t rows, int64_t in,
         int64_t out) {
  for (; rows > 0; rows -= 8, x += 8 * in, y += 8 * out) switch (std::min<int64_t>(rows, 8)) {
      case 1: avx_rows<1, B>(w, block, x, y, bias, in, out); break;
      case 2: avx_rows<2, B>(w, block, x, y, bias, in, out); break;
      case 3: avx_rows<3, B>(w, block, x, y, bias, in, out); break;
      case 4: avx_rows<4, B>(w, block, x, y, bias, in, out); break;
      case 5: avx_rows<5, B>(w, block, x, y, bias, in, out); break;
      case 6: avx_rows<6, B>(w, block, x, y, bias, in, out); break;
      case 7: avx_rows<7, B>(w, block, x, y, bias, in, out); break;
      default: avx_rows<8, B>(w, block, x, y, bias, in, out);
    }
}

#ifdef __AMX_BF16__

// B blocks of 16 outputs; MORE: over 16 vectors, up to 32.
template <int B, bool MORE>
void tiles(const HalfWeight& w, int64_t block, const bf16* x, bf16* y, const bf16* bias, int64_t rows, int64_t in,
           int64_t out) {
  Unpacked<B> weights(w, block, in);
  weights.step(0);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t s = 0; s < in / IN; s++, x += IN) {
    weights.step(s + 1);
    written();
    _tile_loadd(4, x, in * 2);
    if (MORE) _tile_loadd(5, x + 16 * in, in * 2);
    _tile_loadd(6, weights.tile(s, 0), 64);
    _tile_dpbf16ps(0, 4, 6);
    if (MORE) _tile_dpbf16ps(1, 5, 6);
    if (B > 1) {
      _tile_loadd(7, weights.tile(s, B - 1), 64);
      _tile_dpbf16ps(2, 4, 7);
      if (MORE) _tile_dpbf16ps(3, 5, 7);
    }
  }
  alignas(64) float sums[4][16][16];
  _tile_stored(0, sums[0], 64);
  if (MORE) _tile_stored(1, sums[1], 64);
  if (B > 1) _tile_stored(2, sums[2], 64);
  if (B > 1 && MORE) _tile_stored(3, sums[3], 64);
  for (int j = 0; j < B; j++)
    for (int64_t m = 0; m < rows; m++)
      store(y + m * out + j * OUT, _mm512_load_ps(sums[2 * j + m / 16][m % 16]), bias ? bias + j * OUT : nullptr);
}

#endif

// A pair of blocks, or a last block alone, of out / 16; y points to their first output of the first row, rows are `stride`
// apart.
void multiply_pair(Shaped& shaped, const HalfWeight& w, int64_t pair, const bf16* x, bf16* y, const bf16* bias, int64_t rows,
                   int64_t in, int64_t out, int64_t stride) {
  const int64_t block = 2 * pair;
  const bool both = out / OUT - block > 1;
  if (bias) bias += block * OUT;
#ifdef __AMX_BF16__
  if (has_tiles()) {
    for (int64_t m = 0; m < rows; m += 32) {  // the weights of two blocks stay in the cache
      const int64_t some = std::min<int64_t>(rows - m, 32);
      shaped.of(std::min<int64_t>(some, 16), some > 16 ? some - 16 : 1);
      auto run = some > 16 ? (both ? tiles<2, true> : tiles<1, true>) : (both ? tiles<2, false> : tiles<1, false>);
      run(w, block, x + m * in, y + m * stride, bias, some, in, stride);
    }
    return;
  }
#endif
  (both ? avx<2> : avx<1>)(w, block, x, y, bias, rows, in, stride);
}

// How often a pair of blocks has each high byte, counts [256]; weight [out, in].
void count_high(const bf16* weight, int64_t pair, int32_t* counts, int64_t in, int64_t out) {
  const int64_t end = std::min(2 * OUT * (pair + 1), out) * in;
  for (int64_t i = 2 * OUT * pair * in; i < end; i++) counts[weight[i] >> 8]++;
}

// A pair of blocks of weight [out, in]; `to` is zeros but for the table and the numbers of patches.
void pack_half(const bf16* weight, int64_t pair, uint8_t* to, int64_t in, int64_t out) {
  const HalfWeight made(to, in, out);
  alignas(64) int8_t table[64];
  _mm512_store_si512(table, made.table);
  const int64_t first = 2 * pair, blocks = std::min(out / OUT - first, int64_t(2)), fours = blocks * in / IN * 4;
  Patch* patch = const_cast<Patch*>(made.patches) + made.first[pair];
  uint8_t* packed = to + first * (in / IN) * PACKED;
  alignas(64) int32_t rows[16];
  for (int i = 0; i < 16; i++) rows[i] = int32_t(i * in / 2);
  const __m512i outputs = _mm512_load_si512(rows), bytes = _mm512_set1_epi16(255);
  for (int64_t four = 0; four < fours; four++, packed += PACKED / 4) {
    const int64_t block = first + four / 4 % blocks, input = four / 4 / blocks * IN + four % 4 * 8;
    const bf16* from = weight + block * OUT * in + input;
    __m512i nibbles = _mm512_setzero_si512();
    for (int half = 0; half < 2; half++) {
      const __m512i a = _mm512_i32gather_epi32(outputs, from + 4 * half, 4);
      const __m512i b = _mm512_i32gather_epi32(outputs, from + 4 * half + 2, 4);
      const __m512i high = _mm512_packus_epi16(_mm512_srli_epi16(a, 8), _mm512_srli_epi16(b, 8));
      const __m512i low = _mm512_packus_epi16(_mm512_and_si512(a, bytes), _mm512_and_si512(b, bytes));
      __mmask64 others = ~__mmask64(0);
      for (int i = 0; i < 16; i++) {
        const __mmask64 here = _mm512_cmpeq_epi8_mask(high, _mm512_set1_epi8(table[i]));
        nibbles = _mm512_or_si512(nibbles, _mm512_maskz_set1_epi8(here, int8_t(i << 4 * half)));
        others &= ~here;
      }
      _mm512_storeu_si512(packed + 64 * (half + 1), low);
      for (; others; others &= others - 1) {
        const int byte = __builtin_ctzll(others), line = 2 * half + byte % 16 / 8, word = byte / 16 * 8 + byte % 8;
        *patch++ = {uint32_t(four * 128 + line * 32 + word), from[word / 2 * in + 2 * line + word % 2]};
      }
    }
    _mm512_storeu_si512(packed, nibbles);
  }
}

}  // namespace
