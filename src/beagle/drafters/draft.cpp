// A whole draft of one answer with a Beagle head, for CPUs: all levels, and the tree between them, in one parallel region.
//
// Few nodes make a level, so it takes as long as its weights take to be read, if nothing else does. Threads share the
// outputs of products, the heads of attention and the tokens of the LM head, and wait for each other in between.
// Weights are int8 as of products.h, keys and values bf16, and what passes from layer to layer is fp32.

#include "products.h"

#include <omp.h>

#include <cmath>
#include <numeric>

namespace {

struct Matrix {
  const int8_t* weight;  // [out, in] in tiles
  const float* scales;   // [out]
  const int32_t* sums;   // [out]
  const bf16* bias;      // [out] or null
  int64_t in, out;
};

struct Layer {
  const float *query_norm, *state_norm, *mlp_norm;  // [hidden]
  Matrix query, key_value, output, gate, up, down;
};

}  // namespace

extern "C" {

struct Head {
  int64_t hidden, heads, kv_heads, head_dim, blocks, layers, tokens;
  double eps;
  const float *newest, *token;  // [hidden] or null
  const float* layer_norms;     // [layers, hidden], of the target's layers that are read beside the top state
  Matrix layer_proj;
  const Layer* block;
  Matrix lm_head;
  const bf16* embeddings;  // [tokens, hidden]
  const int64_t* ids;      // [tokens], of the target
};

struct Answer {
  const bf16* states;           // [rows, (layers + 1) * hidden], the newest last
  int64_t rows, unread;         // the first `unread` of them get keys
  const bf16* root;             // embedding [hidden]
  bf16* cache;                  // keys, then values [blocks * kv_heads, capacity, head_dim]
  int64_t capacity, keys, slot; // slots that have keys; the root's slot
  const bf16 *cos, *sin;        // [slots, head_dim]
};

struct Plan {
  int64_t depth, width;
  double least, enough;  // as of `grow`
  const float* noise;    // [depth, tokens] or null
};

struct Found {
  int64_t *tokens, *parents;
  double* scores;
};
}

namespace {

constexpr int64_t LANES = 8;  // nodes that attention takes at once

using Rows = std::vector<float>;
using Halves = std::vector<bf16>;

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

// What a node's row of logits comes to in one thread's share of the tokens.
struct Best {
  float most, sum;  // the largest logit, and the sum of exp(logit - most)
  std::vector<std::pair<float, int64_t>> tokens;  // the best, descending
};

// A thread's own memory.
struct Scratch {
  Whole whole;
  Halves rows, queries;
  Rows scores, weights;
};
thread_local Scratch scratch;

void to_half(bf16* y, __m512 x) {
  const __m256bh out = _mm512_cvtneps_pbh(x);
  std::memcpy(y, &out, 32);
}

__m512 exponential(__m512 x) {
  x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-87)), _mm512_set1_ps(88));
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

class Draft {
 public:
  Draft(const Head& head, const Answer& answer, const Plan& plan, const Found& found)
      : head(head), answer(answer), plan(plan), found(found), kv(head.blocks) {}

  int64_t grow() {
    nodes = {-1};
    scores = {0.0};
    seen = {{}};
    embeddings.resize(head.hidden);
    widen(embeddings.data(), answer.root, head.hidden);
    best.resize(omp_get_max_threads());
    bool more = true;
#pragma omp parallel
    {
      const Thread own{omp_get_thread_num(), omp_get_num_threads()};
      read(own);
      for (int64_t level = 1; more; level++) {
        run(level, own);
#pragma omp barrier
#pragma omp single
        more = branch(level, own.n);
      }
    }
    return count;
  }

 private:
  const Head& head;
  const Answer& answer;
  const Plan& plan;
  const Found& found;

  int64_t count = 0;                       // candidates so far
  int64_t appended = 0;                    // keys of nodes behind those of the answer
  std::vector<int64_t> nodes;              // of the level: candidates
  std::vector<double> scores;              // theirs
  std::vector<std::vector<int64_t>> seen;  // the appended keys that each of them sees
  Rows unseen;                             // 0 or -inf [nodes / LANES][appended][LANES]
  Rows embeddings, newest;                 // theirs, and the states before them [nodes, hidden]
  Rows fused;                              // the answer's states [rows, hidden]
  Rows states;                             // what the level predicts [nodes, hidden]
  std::vector<Halves> kv;                  // keys and values of new slots [slots, 2 * kv_heads * head_dim], by block
  Halves product, query, attended, gate, up, logits;
  std::vector<std::vector<Best>> best;     // [threads][nodes]

  static Range multiply(const Matrix& m, const bf16* x, int64_t rows, Halves& y, const Thread& own) {
    const Range range = own.outputs(m.out);
    scratch.whole.of(x, rows, m.in);
    share_whole(m.weight, scratch.whole, y.data(), m.scales, m.sums, m.bias, rows, m.in, m.out, range.from / OUT, range.to / OUT);
    return range;
  }

  // Normed rows of x, in the thread's own memory.
  const bf16* norm(const Rows& x, const float* weight, int64_t rows) const {
    const int64_t d = head.hidden;
    scratch.rows.resize(rows * d);
    for (int64_t m = 0; m < rows; m++)
      normed(&scratch.rows[m * d], &x[m * d], weight, scale_of(&x[m * d], d, head.eps), d);
    return scratch.rows.data();
  }

  // One thread makes room, the others wait for it.
  template <typename Resize>
  static void prepare(const Resize& resize) {
#pragma omp single
    resize();
  }

  // The answer's states as the head reads them.
  void read(const Thread& own) {
    const int64_t d = head.hidden, wide = head.layers * d, width = wide + d;
    prepare([&] {
      fused.resize(answer.rows * d);
      product.resize(answer.rows * d);
    });
    Range range = own.outputs(d);
    if (wide) {
      scratch.rows.resize(answer.rows * wide);
      scratch.scores.resize(d);
      for (int64_t m = 0; m < answer.rows; m++)
        for (int64_t i = 0; i < head.layers; i++) {
          widen(scratch.scores.data(), answer.states + m * width + i * d, d);
          normed(&scratch.rows[m * wide + i * d], scratch.scores.data(), head.layer_norms + i * d,
                 scale_of(scratch.scores.data(), d, head.eps), d);
        }
      multiply(head.layer_proj, scratch.rows.data(), answer.rows, product, own);
    }
    for (int64_t m = 0; m < answer.rows; m++)
      for (int64_t k = range.from; k < range.to; k += 16) {
        __m512 sum = Whole::load(answer.states + m * width + wide + k);
        if (wide) sum = _mm512_add_ps(sum, Whole::load(&product[m * d + k]));
        _mm512_storeu_ps(&fused[m * d + k], sum);
      }
#pragma omp barrier
#pragma omp single
    newest.assign(fused.end() - d, fused.end());
  }

  void run(int64_t level, const Thread& own) {
    const int64_t n = nodes.size(), d = head.hidden, slots = level == 1 ? answer.unread : n;
    prepare([&] {
      for (Halves& of : kv) of.resize(slots * head.block[0].key_value.out);
      product.resize(n * d);
      query.resize(n * head.block[0].query.out);
      attended.resize(query.size());
      gate.resize(n * head.block[0].gate.out);
      up.resize(gate.size());
      logits.resize(n * head.tokens);
      states.resize(n * d);
    });
    for (int64_t b = 0; slots && b < head.blocks; b++) {
      const Layer& layer = head.block[b];
      multiply(layer.key_value, norm(level == 1 ? fused : newest, layer.state_norm, slots), slots, kv[b], own);
    }
    for (int64_t b = 0; b < head.blocks; b++) {
      const Layer& layer = head.block[b];
      multiply(layer.query, norm(b ? states : embeddings, layer.query_norm, n), n, query, own);
#pragma omp barrier
      const Range kv_heads = own.of(head.kv_heads);
      for (int64_t g = kv_heads.from; g < kv_heads.to; g++) {
        remember(level, b, g, slots);
        attend(level, b, g, n);
      }
#pragma omp barrier
      add_attended(b, n, own);
#pragma omp barrier
      feed_forward(b, n, own);
#pragma omp barrier
    }
    scratch.rows.resize(n * d);
    for (int64_t k = 0; k < n * d; k += 16) to_half(&scratch.rows[k], _mm512_loadu_ps(&states[k]));
    const Range range = multiply(head.lm_head, scratch.rows.data(), n, logits, own);
    best[own.i].resize(n);
    for (int64_t m = 0; m < n; m++) scan(level, m, range, best[own.i][m]);
  }

  bf16* cached(int64_t b, int64_t g, bool values) const {
    const int64_t heads = head.blocks * head.kv_heads;
    return answer.cache + ((values ? heads : 0) + b * head.kv_heads + g) * answer.capacity * head.head_dim;
  }

  int64_t known() const { return answer.keys + answer.unread; }

  // Keys and values of new slots into the cache.
  void remember(int64_t level, int64_t b, int64_t g, int64_t slots) const {
    const int64_t d = head.head_dim, width = 2 * head.kv_heads * d;
    for (int64_t m = 0; m < slots; m++) {
      const int64_t at = level == 1 ? answer.keys + m : known() + appended - slots + m;
      const int64_t slot = level == 1 ? at : answer.slot + level - 1;
      const bf16* row = &kv[b][m * width + g * d];
      rotate(cached(b, g, false) + at * d, row, answer.cos + slot * d, answer.sin + slot * d, d);
      std::memcpy(cached(b, g, true) + at * d, row + head.kv_heads * d, 2 * d);
    }
  }

  // Attention of the query heads that meet one cached head, of LANES nodes at a time.
  void attend(int64_t level, int64_t b, int64_t g, int64_t n) {
    const int64_t d = head.head_dim, group = head.heads / head.kv_heads, at = (answer.slot + level - 1) * d;
    for (int64_t h = g * group; h < (g + 1) * group; h++)
      for (int64_t first = 0; first < n; first += LANES) {
        const int64_t some = std::min(n - first, LANES);
        scratch.queries.assign(LANES * d, 0);
        for (int64_t j = 0; j < some; j++)
          rotate(&scratch.queries[j * d], &query[((first + j) * head.heads + h) * d], answer.cos + at, answer.sin + at, d);
        score(cached(b, g, false));
        float sums[LANES];
        soften(first, sums);
        for (int64_t j = 0; j < some; j += 4)
          add_values(cached(b, g, true), j, std::min<int64_t>(some - j, 4), sums + j, &attended[((first + j) * head.heads + h) * d]);
      }
  }

  // Scores of all keys [keys, LANES].
  void score(const bf16* keys) const {
    const int64_t d = head.head_dim, end = known() + appended;
    scratch.scores.resize((end + 15) / 16 * 16 * LANES);
#ifdef __AMX_BF16__
    if (has_tiles()) {
      scratch.weights.resize(d / 2 * LANES);  // queries in pairs of inputs [d / 2][LANES][2]
      for (int64_t k = 0; k < d; k += 2)
        for (int64_t j = 0; j < LANES; j++) std::memcpy(&scratch.weights[k / 2 * LANES + j], &scratch.queries[j * d + k], 4);
      TileShapes shapes;  // 0 are scores, 1 keys, 2 queries
      for (int i = 0; i < 3; i++) {
        shapes.rows[i] = 16;
        shapes.bytes[i] = i == 1 ? 64 : 4 * LANES;
      }
      _tile_loadconfig(&shapes);
      for (int64_t t = 0; t < end; t += 16) {  // behind the last key lie other numbers, whose scores nobody reads
        _tile_zero(0);
        for (int64_t k = 0; k < d; k += 32) {
          _tile_loadd(1, keys + t * d + k, 2 * d);
          _tile_loadd(2, &scratch.weights[k / 2 * LANES], 4 * LANES);
          _tile_dpbf16ps(0, 1, 2);
        }
        _tile_stored(0, &scratch.scores[t * LANES], 4 * LANES);
      }
      _tile_release();
      return;
    }
#endif
    for (int64_t t = 0; t < end; t++)
      for (int64_t j = 0; j < LANES; j++) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t k = 0; k < d; k += 32)
          sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(keys + t * d + k), (__m512bh)_mm512_loadu_si512(&scratch.queries[j * d + k]));
        scratch.scores[t * LANES + j] = _mm512_reduce_add_ps(sum);
      }
  }

  // Scores to weights, as pairs of bf16 [keys / 2][LANES][2], and what they are to be divided by.
  void soften(int64_t first, float* sums) const {
    const int64_t end = known() + appended;
    float* s = scratch.scores.data();
    const float* hidden = &unseen[first * appended];
    for (int64_t k = 0; k < appended * LANES; k += LANES) {
      float* own = s + known() * LANES + k;
      _mm256_storeu_ps(own, _mm256_add_ps(_mm256_loadu_ps(own), _mm256_loadu_ps(hidden + k)));
    }
    if (end % 2) std::fill_n(s + end * LANES, LANES, -INFINITY);
    __m512 most = _mm512_loadu_ps(s);  // of two keys at a time
    for (int64_t t = 2; t < end; t += 2) most = _mm512_max_ps(most, _mm512_loadu_ps(s + t * LANES));
    most = _mm512_max_ps(most, _mm512_shuffle_f32x4(most, most, 0x4e));
    const __m512 scale = _mm512_set1_ps(1 / std::sqrt(float(head.head_dim)));
    __m512 sum = _mm512_setzero_ps();
    scratch.weights.resize((end + 1) / 2 * LANES);
    const __m256i rounding = _mm256_set1_epi32(0x8000), high = _mm256_set1_epi32(int(0xffff0000));
    for (int64_t t = 0; t < end; t += 2) {
      const __m512 two = exponential(_mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(s + t * LANES), most), scale));
      sum = _mm512_add_ps(sum, two);
      const __m512i bits = _mm512_castps_si512(two);
      const __m256i low = _mm256_srli_epi32(_mm256_add_epi32(_mm512_castsi512_si256(bits), rounding), 16);
      const __m256i top = _mm256_and_si256(_mm256_add_epi32(_mm512_extracti64x4_epi64(bits, 1), rounding), high);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(&scratch.weights[t / 2 * LANES]), _mm256_or_si256(low, top));
    }
    _mm256_storeu_ps(sums, _mm256_add_ps(_mm512_castps512_ps256(sum), _mm512_castps512_ps256(_mm512_shuffle_f32x4(sum, sum, 0x4e))));
  }

  // Weighted values of up to 4 nodes.
  void add_values(const bf16* values, int64_t first, int64_t some, const float* sums, bf16* out) const {
    const int64_t d = head.head_dim;
    for (int64_t at = 0; at < d; at += 64)
      (some == 1 ? add_some<1> : some == 2 ? add_some<2> : add_some<4>)(values + at, d, known() + appended, first, some, sums, out + at, head.heads * d);
  }

  template <int N>
  static void add_some(const bf16* values, int64_t d, int64_t end, int64_t first, int64_t some, const float* sums, bf16* out, int64_t width) {
    static const __m512i LOW = interleaved(0), HIGH = interleaved(16);
    __m512 total[N][4] = {};
    for (int64_t t = 0; t < end; t += 2) {
      const bf16* row = values + t * d;
      __m512bh pairs[4];
      for (int c = 0; c < 2; c++) {
        const __m512i a = _mm512_loadu_si512(row + 32 * c), b = _mm512_loadu_si512(row + d + 32 * c);
        pairs[2 * c] = (__m512bh)_mm512_permutex2var_epi16(a, LOW, b);
        pairs[2 * c + 1] = (__m512bh)_mm512_permutex2var_epi16(a, HIGH, b);
      }
      for (int j = 0; j < N; j++) {
        const __m512bh weight = (__m512bh)_mm512_castps_si512(_mm512_set1_ps(scratch.weights[t / 2 * LANES + first + j]));
        for (int c = 0; c < 4; c++) total[j][c] = _mm512_dpbf16_ps(total[j][c], pairs[c], weight);
      }
    }
    for (int64_t j = 0; j < some; j++)
      for (int c = 0; c < 4; c++) to_half(out + j * width + 16 * c, _mm512_div_ps(total[j][c], _mm512_set1_ps(sums[j])));
  }

  // Which of two vectors of 32 halves make 16 pairs, one of each.
  static __m512i interleaved(int from) {
    alignas(64) int16_t index[32];
    for (int i = 0; i < 16; i++) {
      index[2 * i] = int16_t(from + i);
      index[2 * i + 1] = int16_t(32 + from + i);
    }
    return _mm512_load_si512(index);
  }

  // Attention's output and the residual, and in the first block the newest state.
  void add_attended(int64_t b, int64_t n, const Thread& own) {
    const int64_t d = head.hidden;
    const Range range = multiply(head.block[b].output, attended.data(), n, product, own);
    for (int64_t m = 0; m < n; m++) {
      const bool first = b == 0 && head.newest;
      const __m512 scale = _mm512_set1_ps(first ? scale_of(&newest[m * d], d, head.eps) : 0);
      for (int64_t k = range.from; k < range.to; k += 16) {
        __m512 sum = _mm512_add_ps(Whole::load(&product[m * d + k]), _mm512_loadu_ps((b ? states : embeddings).data() + m * d + k));
        if (first) sum = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_loadu_ps(&newest[m * d + k]), scale), _mm512_loadu_ps(head.newest + k), sum);
        _mm512_storeu_ps(&states[m * d + k], sum);
      }
    }
  }

  void feed_forward(int64_t b, int64_t n, const Thread& own) {
    const int64_t d = head.hidden;
    const Layer& layer = head.block[b];
    norm(states, layer.mlp_norm, n);
    for (int64_t m = 0; b == 0 && head.token && m < n; m++) {
      const __m512 scale = _mm512_set1_ps(scale_of(&embeddings[m * d], d, head.eps));
      for (int64_t k = 0; k < d; k += 16) {
        const __m512 token = _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(&embeddings[m * d + k]), scale), _mm512_loadu_ps(head.token + k));
        to_half(&scratch.rows[m * d + k], _mm512_add_ps(Whole::load(&scratch.rows[m * d + k]), token));
      }
    }
    const Range inner = multiply(layer.gate, scratch.rows.data(), n, gate, own);
    multiply(layer.up, scratch.rows.data(), n, up, own);
    for (int64_t m = 0; m < n; m++)
      for (int64_t k = m * layer.gate.out + inner.from; k < m * layer.gate.out + inner.to; k += 16) {
        const __m512 x = Whole::load(&gate[k]);
        const __m512 silu = _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1), exponential(_mm512_sub_ps(_mm512_setzero_ps(), x))));
        to_half(&gate[k], _mm512_mul_ps(silu, Whole::load(&up[k])));
      }
#pragma omp barrier
    const Range range = multiply(layer.down, gate.data(), n, product, own);
    for (int64_t m = 0; m < n; m++)
      for (int64_t k = m * d + range.from; k < m * d + range.to; k += 16)
        _mm512_storeu_ps(&states[k], _mm512_add_ps(_mm512_loadu_ps(&states[k]), Whole::load(&product[k])));
  }

  void scan(int64_t level, int64_t node, Range range, Best& out) const {
    const bf16* row = &logits[node * head.tokens];
    const float* noise = plan.noise ? plan.noise + (level - 1) * head.tokens : nullptr;
    const auto at = [&](int64_t k) {
      const __m512 x = Whole::load(row + k);
      return noise ? _mm512_add_ps(x, _mm512_loadu_ps(noise + k)) : x;
    };
    out.tokens.clear();
    float last = -INFINITY;  // what a token must be above
    for (int64_t k = range.from; k < range.to; k += 16) {
      const __m512 x = at(k);
      unsigned above = _mm512_cmp_ps_mask(x, _mm512_set1_ps(last), _CMP_GT_OQ);
      if (!above) continue;
      alignas(64) float lanes[16];
      _mm512_store_ps(lanes, x);
      for (; above; above &= above - 1) {
        const int i = __builtin_ctz(above);
        if (!(lanes[i] > last)) continue;
        const auto place = std::find_if(out.tokens.begin(), out.tokens.end(), [&](const auto& other) { return other.first < lanes[i]; });
        out.tokens.insert(place, {lanes[i], k + i});
        if (int64_t(out.tokens.size()) > plan.width) out.tokens.pop_back();
        if (int64_t(out.tokens.size()) == plan.width) last = out.tokens.back().first;
      }
    }
    out.most = out.tokens.empty() ? -INFINITY : out.tokens[0].first;
    __m512 sum = _mm512_setzero_ps();
    for (int64_t k = range.from; k < range.to; k += 16) sum = _mm512_add_ps(sum, exponential(_mm512_sub_ps(at(k), _mm512_set1_ps(out.most))));
    out.sum = _mm512_reduce_add_ps(sum);
  }

  // The level's candidates, and the nodes of the next one; whether there is one.
  bool branch(int64_t level, int64_t threads) {
    const int64_t first = count, n = nodes.size(), children = std::min(plan.width, head.tokens);
    std::vector<int64_t> drafted;
    for (int64_t m = 0; m < n; m++) {
      std::vector<std::pair<float, int64_t>> tokens;
      float most = -INFINITY, sum = 0;
      for (int64_t i = 0; i < threads; i++) {
        const Best& own = best[i][m];
        tokens.insert(tokens.end(), own.tokens.begin(), own.tokens.end());
        most = std::max(most, own.most);
      }
      for (int64_t i = 0; i < threads; i++)
        if (!best[i][m].tokens.empty()) sum += best[i][m].sum * std::exp(best[i][m].most - most);
      const double total = most + std::log(sum);
      std::stable_sort(tokens.begin(), tokens.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
      for (int64_t i = 0; i < children; i++, count++) {
        // rounding may put the log of a probability near 1 above 0, and a child before its parent
        found.scores[count] = scores[m] + std::min(tokens[i].first - total, 0.0);
        found.tokens[count] = head.ids[tokens[i].second];
        found.parents[count] = nodes[m];
        drafted.push_back(tokens[i].second);
      }
    }
    if (level == plan.depth) return false;
    std::vector<int64_t> order(count - first);
    std::iota(order.begin(), order.end(), first);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return found.scores[a] > found.scores[b]; });
    if (int64_t(order.size()) > plan.width) order.resize(plan.width);
    if (plan.enough > 0) {
      double expected = 0;
      size_t worth = 0;
      for (; worth < order.size() && found.scores[order[worth]] >= plan.least; worth++) expected += std::exp(found.scores[order[worth]]);
      if (expected < plan.enough) return false;
      order.resize(worth);
    }
    descend(first, children, order, drafted);
    return true;
  }

  void descend(int64_t first, int64_t children, const std::vector<int64_t>& order, const std::vector<int64_t>& drafted) {
    const int64_t d = head.hidden, n = order.size();
    std::vector<std::vector<int64_t>> above = std::move(seen);
    seen.clear();
    newest.resize(n * d);
    embeddings.resize(n * d);
    nodes = order;
    scores.clear();
    for (int64_t i = 0; i < n; i++) {
      const int64_t parent = (order[i] - first) / children;
      std::copy_n(&states[parent * d], d, &newest[i * d]);
      widen(&embeddings[i * d], head.embeddings + drafted[order[i] - first] * d, d);
      scores.push_back(found.scores[order[i]]);
      seen.push_back(above[parent]);
      seen.back().push_back(appended + i);
    }
    appended += n;
    unseen.assign((n + LANES - 1) / LANES * LANES * appended, -INFINITY);
    for (int64_t i = 0; i < n; i++)
      for (int64_t key : seen[i]) unseen[(i / LANES * appended + key) * LANES + i % LANES] = 0;
  }
};

}  // namespace

// The candidates, parents before children: at most width + (depth - 1) * width * width; how many.
extern "C" int64_t beagle_draft(const Head* head, const Answer* answer, const Plan* plan, const Found* found) {
  return Draft(*head, *answer, *plan, *found).grow();
}
