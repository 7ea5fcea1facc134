// Attention of few queries over many keys, for CPUs; bf16, its sums in fp32.
//
// Keys and values are read once for all queries. Blocks of 32 keys are put in order for the products: keys in pairs of
// inputs, values in pairs of keys. What a query gets does not depend on the queries beside it.

#pragma once

#include <cmath>
#include <limits>

#include "products.h"

namespace {

constexpr int64_t BLOCK = 32;  // keys that are put in order together
constexpr float LOG2E = 1.44269504f;

void to_half(bf16* y, __m512 x) {
  const __m256bh out = _mm512_cvtneps_pbh(x);
  std::memcpy(y, &out, 32);
}

// Within 1e-4 of 2^x, for x of 0 and below.
__m512 power(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-126), x);
  const __m512 whole = _mm512_roundscale_ps(x, 0), rest = _mm512_sub_ps(x, whole);
  __m512 sum = _mm512_fmadd_ps(_mm512_set1_ps(0.0558f), rest, _mm512_set1_ps(0.2402f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(0.693147f));
  return _mm512_scalef_ps(_mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1)), whole);
}

__m512 exponential(__m512 x) {
  x = _mm512_min_ps(_mm512_set1_ps(88), _mm512_max_ps(_mm512_set1_ps(-87), x));  // in this order NaN stays NaN
  const __m512 twos = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(LOG2E)), 0);
  const __m512 rest = _mm512_fnmadd_ps(twos, _mm512_set1_ps(0.693147181f), x);
  __m512 sum = _mm512_set1_ps(1.f / 120);
  for (float term : {1.f / 24, 1.f / 6, 1.f / 2, 1.f, 1.f}) sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(term));
  return _mm512_scalef_ps(sum, twos);
}

// 16 rows of 16 words become columns.
void transpose(__m512i* r) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {
      r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
      r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
    }
  for (int i = 0; i < 16; i += 8)
    for (int j = 0; j < 4; j++) {
      t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + 4 + j], 0x88);
      t[i + 4 + j] = _mm512_shuffle_i32x4(r[i + j], r[i + 4 + j], 0xdd);
    }
  for (int j = 0; j < 8; j++) {
    r[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
    r[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd);
  }
}

// Which of two vectors of 32 halves make 16 pairs, one of each, from a place in them on.
__m512i interleaved(int from) {
  alignas(64) int16_t index[32];
  for (int i = 0; i < 16; i++) {
    index[2 * i] = int16_t(from + i);
    index[2 * i + 1] = int16_t(32 + from + i);
  }
  return _mm512_load_si512(index);
}

// A block of keys in the order of one query, which lie among others in memory.
struct alignas(64) Places {
  int32_t place[BLOCK] = {};  // of each of the query's keys
  int16_t key[BLOCK] = {};    // of each place, where it is one of the query's
  uint32_t seen = 0;          // which places those are
};

// What a query sees of some keys: the first blocks as they are, then some of each block's.
struct Path {
  int64_t count;  // of keys that it sees
  int64_t whole;  // blocks as they are
  std::vector<Places> blocks;
};

// The queries of one cached head.
struct Queries {
  const bf16* x;  // [rows, width]
  int64_t rows, width;
  const bf16* mask;    // added to the scores of all keys [mask_rows, mask_width], over and over; or null
  int64_t mask_width;  // 0: one for all rows
  int64_t mask_rows;
  const Path* paths = nullptr;  // each of so many rows, or null: all rows see all keys
  int64_t path_rows = 1;
};

// Keys and values that were put beside each other, in whole blocks of memory.
struct Gathered {
  Lined<bf16> keys, values;

  void resize(int64_t count, int64_t in, int64_t out) {
    const int64_t room = (count + BLOCK - 1) / BLOCK * BLOCK;
    keys.resize(room * in);
    values.resize(room * out);
    std::fill(keys.begin() + count * in, keys.end(), 0);  // no weight makes a NaN nothing
    std::fill(values.begin() + count * out, values.end(), 0);
  }
};

// Some keys of one cached head, and what queries make of them.
class Keys {
 public:
  // Keys and values from one place to another; inputs and outputs in multiples of 32 and 16. The first `done` keys are
  // in order since the last time.
  void order(const bf16* keys, const bf16* values, int64_t from, int64_t to, int64_t inputs, int64_t outputs, int64_t done = 0) {
    first = from;
    in = inputs;
    out = outputs;
    done -= done % BLOCK;
    const int64_t more = to - from - done, rest = more % BLOCK;
    append(keys + (from + done) * in, values + (from + done) * out, done, more - rest);
    if (rest == 0) return;
    last.resize(rest, in, out);  // what lies behind them may not be memory
    std::copy_n(keys + (to - rest) * in, rest * in, last.keys.begin());
    std::copy_n(values + (to - rest) * out, rest * out, last.values.begin());
    append(last.keys.data(), last.values.data(), to - from - rest, rest);
  }

  // Further keys and values, in whole blocks of memory, behind whole blocks of so many keys.
  void append(const bf16* k, const bf16* v, int64_t before, int64_t more) {
    count = before + more;
    blocks = (count + BLOCK - 1) / BLOCK;
    ordered.resize(blocks * BLOCK * in / 2);
    paired.resize(blocks * BLOCK * out / 2);
    for (int64_t b = before / BLOCK; b < blocks; b++, k += BLOCK * in, v += BLOCK * out) {
      order_keys(k, &ordered[b * BLOCK * in / 2], in);
      pair_values(v, &paired[b * BLOCK * out / 2], out);
    }
  }

  // Of each query its largest score, the sum of exp(score - largest), and the sum of values with these weights
  // [rows, out].
  void attend(Shaped& shaped, const Queries& q, float scale, float* most, float* sums, float* y) {
    constexpr int64_t TOGETHER = 4;  // tiles of queries: what one step leaves is not read at once by the next
    const int64_t tiles = (q.rows + 15) / 16, size = (q.rows + tiles - 1) / tiles;  // alike: new shapes take long
    for (int64_t first_row = 0; first_row < q.rows; first_row += TOGETHER * size) {
      const int64_t rows = std::min(q.rows - first_row, TOGETHER * size);
      scores.resize(rows * width());
      weights.resize(scores.size());
      const bf16* x = q.x + first_row * q.width;
      float* to = y + first_row * out;
#ifdef __AMX_BF16__
      if (has_tiles()) {
        const auto each = [&](const auto& work) {
          for (int64_t r = 0; r < rows; r += size) {
            const int64_t some = std::min(rows - r, size);
            shaped.of(some, some);
            work(r);
          }
        };
        each([&](int64_t r) { score_tiles(x + r * q.width, q.width, &scores[r * width()]); });
        soften(q, first_row, rows, scale, most + first_row, sums + first_row);
        each([&](int64_t r) { add_tiles(&weights[r * width()], to + r * out); });
        continue;
      }
#endif
      score(x, q.width, rows);
      soften(q, first_row, rows, scale, most + first_row, sums + first_row);
      add(to, rows);
    }
  }

 private:
  int64_t first, count, in, out, blocks;
  Lined<uint32_t> ordered;  // [blocks, 2, in / 2, 16 keys] pairs of inputs
  Lined<uint32_t> paired;   // [blocks, BLOCK / 2, out] pairs of keys
  Lined<bf16> weights;
  Gathered last;
  Lined<float> scores;  // [rows, keys], as the weights

  int64_t width() const { return blocks * BLOCK; }

  // Both prefetch the next block, and take sizes as copies: for the compiler each store may change a member.
  static void order_keys(const bf16* k, uint32_t* to, const int64_t in) {
    for (int64_t half = 0; half < 2; half++, k += 16 * in)
      for (int64_t c = 0; c < in; c += 32, to += 256) {
        __m512i rows[16];
        for (int i = 0; i < 16; i++) {
          _mm_prefetch(reinterpret_cast<const char*>(k + (BLOCK + i) * in + c), _MM_HINT_T0);
          rows[i] = _mm512_loadu_si512(k + i * in + c);
        }
        transpose(rows);
        for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + 16 * i, rows[i]);
      }
  }

  static void pair_values(const bf16* v, uint32_t* to, const int64_t out) {
    static const __m512i ORDER = interleaved(0);
    const __m512i order = ORDER;
    for (int64_t t = 0; t < BLOCK; t += 2, v += 2 * out, to += out)
      for (int64_t c = 0; c < out; c += 16) {
        _mm_prefetch(reinterpret_cast<const char*>(v + BLOCK * out + 2 * c), _MM_HINT_T0);
        const __m512i a = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(v + c)));
        const __m512i b = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(v + out + c)));
        _mm512_storeu_si512(to + c, _mm512_permutex2var_epi16(a, order, b));
      }
  }

#ifdef __AMX_BF16__
  // Queries or weights are in tile 4, keys or values in 6 and 7. Several sums grow side by side: a product takes as long as
  // four of them.
  void score_tiles(const bf16* x, int64_t stride, float* to_scores) const {
    written();
    for (int64_t half = 0; half < 2 * blocks; half += 4) {
      const uint32_t* to = &ordered[half * in * 8];
      const bool more = half + 2 < 2 * blocks;
      zero_tiles();
      for (int64_t c = 0; c < in; c += 32, to += 256) {
        _tile_loadd(4, x + c, 2 * stride);
        _tile_loadd(6, to, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, to + in * 8, 64);
        _tile_dpbf16ps(1, 4, 7);
        if (!more) continue;
        _tile_loadd(6, to + 2 * in * 8, 64);
        _tile_dpbf16ps(2, 4, 6);
        _tile_loadd(7, to + 3 * in * 8, 64);
        _tile_dpbf16ps(3, 4, 7);
      }
      _tile_stored(0, to_scores + half * 16, 4 * width());
      _tile_stored(1, to_scores + half * 16 + 16, 4 * width());
      if (!more) continue;
      _tile_stored(2, to_scores + half * 16 + 32, 4 * width());
      _tile_stored(3, to_scores + half * 16 + 48, 4 * width());
    }
  }

  void add_tiles(const bf16* own, float* y) const {
    written();
    for (int64_t c = 0; c < out; c += 64) {
      const int64_t some = (out - c) / 16;
      zero_tiles();
      for (int64_t b = 0; b < blocks; b++) {
        const uint32_t* from = &paired[b * BLOCK / 2 * out + c];
        _tile_loadd(4, own + b * BLOCK, 2 * width());
        _tile_loadd(6, from, 4 * out);
        _tile_dpbf16ps(0, 4, 6);
        if (some > 1) _tile_loadd(7, from + 16, 4 * out);
        if (some > 1) _tile_dpbf16ps(1, 4, 7);
        if (some > 2) _tile_loadd(6, from + 32, 4 * out);
        if (some > 2) _tile_dpbf16ps(2, 4, 6);
        if (some > 3) _tile_loadd(7, from + 48, 4 * out);
        if (some > 3) _tile_dpbf16ps(3, 4, 7);
      }
      _tile_stored(0, y + c, 4 * out);
      if (some > 1) _tile_stored(1, y + c + 16, 4 * out);
      if (some > 2) _tile_stored(2, y + c + 32, 4 * out);
      if (some > 3) _tile_stored(3, y + c + 48, 4 * out);
    }
  }

  static void zero_tiles() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
#endif

  static __m512bh both(const bf16* pair) {
    int32_t word;
    std::memcpy(&word, pair, 4);
    return (__m512bh)_mm512_set1_epi32(word);
  }

  void score(const bf16* x, int64_t stride, int64_t rows) {
    for (int64_t half = 0; half < 2 * blocks; half++)
      for (int64_t r = 0; r < rows; r++) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t c = 0; c < in; c += 2)
          sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(&ordered[(half * in + c) / 2 * 16]), both(x + r * stride + c));
        _mm512_storeu_ps(&scores[r * width() + half * 16], sum);
      }
  }

  void add(float* y, int64_t rows) const {
    for (int64_t r = 0; r < rows; r++)
      for (int64_t c = 0; c < out; c += 16) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t t = 0; t < width(); t += 2)
          sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(&paired[t / 2 * out + c]), both(&weights[r * width() + t]));
        _mm512_storeu_ps(y + r * out + c, sum);
      }
  }

  // Scores to weights.
  void soften(const Queries& q, int64_t from, int64_t rows, float scale, float* most, float* sums) {
    const int64_t all = width();
    for (int64_t r = 0; r < rows; r++) {
      float* s = &scores[r * all];
      bf16* own = &weights[r * all];
      const Path* path = q.paths ? q.paths + (from + r) / q.path_rows : nullptr;
      const int64_t seen = path ? path->count : count, whole = seen / 16 * 16;
      if (path) to_query(*path, s);
      const bf16* mask = q.mask ? q.mask + (from + r) % q.mask_rows * q.mask_width + first : nullptr;
      const __m512 times = _mm512_set1_ps(scale * LOG2E);
      __m512 largest = _mm512_set1_ps(-std::numeric_limits<float>::max());
      const auto masked = [&](int64_t t, __mmask16 there) {
        const __m512 halves = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, mask + t)), 16));
        return _mm512_mul_ps(halves, _mm512_set1_ps(LOG2E));
      };
      const auto score = [&](int64_t t, __mmask16 there) {
        const __m512 x = _mm512_mul_ps(_mm512_loadu_ps(s + t), times);
        return mask ? _mm512_add_ps(x, masked(t, there)) : x;
      };
      for (int64_t t = 0; t < whole; t += 16) largest = _mm512_max_ps(largest, score(t, 0xffff));
      const __mmask16 last = (1 << (seen - whole)) - 1;
      if (last) largest = _mm512_mask_max_ps(largest, last, largest, score(whole, last));
      const float top = _mm512_reduce_max_ps(largest);
      __m512 sum = _mm512_setzero_ps();
      const auto weigh = [&](int64_t t, __mmask16 there) {
        const __m512 x = _mm512_maskz_mov_ps(there, power(_mm512_sub_ps(score(t, there), _mm512_set1_ps(top))));
        sum = _mm512_add_ps(sum, x);
        to_half(own + t, x);
      };
      for (int64_t t = 0; t < whole; t += 16) weigh(t, 0xffff);
      if (last) weigh(whole, last);
      std::fill(own + (seen + 15) / 16 * 16, own + all, bf16(0));
      most[r] = top / LOG2E;
      sums[r] = _mm512_reduce_add_ps(sum);
      if (path) to_memory(*path, own);
    }
  }

  // Scores from the order of memory to that of a query's keys, and weights back.
  static void to_query(const Path& path, float* s) {
    s += path.whole * BLOCK;
    for (const Places& places : path.blocks) {
      const __m512 low = _mm512_loadu_ps(s), high = _mm512_loadu_ps(s + 16);
      for (int64_t t = 0; t < BLOCK; t += 16)
        _mm512_storeu_ps(s + t, _mm512_permutex2var_ps(low, _mm512_load_si512(places.place + t), high));
      s += BLOCK;
    }
  }

  static void to_memory(const Path& path, bf16* own) {
    own += path.whole * BLOCK;
    for (const Places& places : path.blocks) {
      const __m512i keys = _mm512_load_si512(places.key), halves = _mm512_loadu_si512(own);
      _mm512_storeu_si512(own, _mm512_maskz_permutexvar_epi16(places.seen, keys, halves));
      own += BLOCK;
    }
  }
};

constexpr int64_t CHUNK = 128;  // keys whose weighted values are summed by themselves

struct Strides {
  int64_t batch, head, row;
};

// Attention of all heads in two steps, which threads share: chunks of keys by themselves, then rows of queries. So what a
// query gets does not depend on the threads, nor on keys behind those that it sees.
class Chunks {
 public:
  int64_t batch, heads, rows, keys, in, out;  // of cached heads; rows of queries
  const bf16 *k, *v, *mask;                   // [batch, heads, keys, …], rows in one piece; the mask is added to scores, or null
  Strides of_k, of_v, of_mask;
  float scale;
  int64_t own = 0;  // chunks of each row behind those that all rows share

  int64_t shared() const { return (keys + CHUNK - 1) / CHUNK; }

  int64_t tasks() const { return batch * heads * shared(); }

  int64_t all_rows() const { return batch * heads * rows; }

  void make_room() {
    const int64_t all = batch * heads * (shared() + own) * rows;
    most.resize(all);
    sums.resize(all);
    parts.resize(all * out);
  }

  // One chunk of one head; q [batch, heads, rows, in].
  void sum(Shaped& shaped, int64_t task, const bf16* q) {
    thread_local Keys chunk;
    const int64_t head = task / shared(), j = task % shared(), from = j * CHUNK, b = head / heads, h = head % heads;
    chunk.order(k + b * of_k.batch + h * of_k.head, v + b * of_v.batch + h * of_v.head, from, std::min(from + CHUNK, keys), in, out);
    const bf16* added = mask ? mask + b * of_mask.batch + h * of_mask.head : nullptr;
    sum(shaped, chunk, head, j, {q + head * rows * in, rows, in, added, of_mask.row, rows}, 0);
  }

  // Some rows of a head, from one on, over a chunk of keys.
  void sum(Shaped& shaped, Keys& chunk, int64_t head, int64_t j, const Queries& q, int64_t from) {
    const int64_t at = first(head) + j * rows + from;
    chunk.attend(shaped, q, scale, &most[at], &sums[at], &parts[at * out]);
  }

  // What some rows of a head get of a chunk is no number.
  void spoil(int64_t head, int64_t j, int64_t from, int64_t some) {
    std::fill_n(&sums[first(head) + j * rows + from], some, std::numeric_limits<float>::quiet_NaN());
  }

  // One row's sums of its first chunks; y [out].
  void merge(int64_t row, int64_t chunks, bf16* y) {
    thread_local Lined<float> shares;
    shares.resize(chunks);
    const int64_t at = first(row / rows) + row % rows;  // its place in the first of them
    float top = most[at];
    for (int64_t j = 1; j < chunks; j++) top = std::max(top, most[at + j * rows]);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t j = 0; j < chunks; j += 16) {
      const __mmask16 there = chunks - j < 16 ? (1 << (chunks - j)) - 1 : 0xffff;
      const __m512 less = _mm512_sub_ps(every_row(most, at + j * rows, there), _mm512_set1_ps(top));
      const __m512 share = _mm512_maskz_mov_ps(there, exponential(less));
      _mm512_mask_storeu_ps(&shares[j], there, share);
      sum = _mm512_fmadd_ps(share, every_row(sums, at + j * rows, there), sum);
    }
    const __m512 all = _mm512_set1_ps(_mm512_reduce_add_ps(sum));
    for (int64_t c = 0; c < out; c += 16) {
      __m512 total = _mm512_setzero_ps();
      for (int64_t j = 0; j < chunks; j++)
        total = _mm512_fmadd_ps(_mm512_set1_ps(shares[j]), _mm512_loadu_ps(&parts[(at + j * rows) * out + c]), total);
      to_half(y + c, _mm512_div_ps(total, all));
    }
  }

 private:
  Lined<float> most, sums, parts;  // [batch, heads, chunks, rows], of parts [..., out]

  int64_t first(int64_t head) const { return head * (shared() + own) * rows; }

  // Of up to 16 chunks in turn, from a place on.
  __m512 every_row(const Lined<float>& of, int64_t from, __mmask16 there) const {
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i places = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(int32_t(rows)));
    return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), there, places, &of[from], 4);
  }
};

}  // namespace
