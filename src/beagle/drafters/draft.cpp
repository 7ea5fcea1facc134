// A whole draft of one answer with a Beagle head, for CPUs: all levels, and the tree between them, in one parallel region.
//
// Few nodes make a level, so it takes as long as its weights take to be read, if nothing else does. Threads share the
// outputs of products, the heads of attention and the tokens of the LM head, and wait for each other in between.
// Weights are int8 as of products.h, keys and values bf16, and what passes from layer to layer is fp32.

#include <omp.h>

#include <numeric>

#include "layers.h"

namespace {

constexpr bf16 UNSEEN = 0xff80;  // -infinity

struct Layer {
  const float *query_norm, *state_norm, *mlp_norm;  // [hidden]
  Matrix query, key_value, output, gate, up, down;
};

}  // namespace

// Tokens of one answer that its head's vocabulary lacks: names in the prompt, say. A draft may have them, too.
struct Own {
  int64_t count = 0;
  Lined<int8_t> weight;  // of the LM head, in whole blocks; what fills up the last has logits of minus infinity
  std::vector<float> scales;
  std::vector<int32_t> sums;
  Halves bias, embeddings;
  std::vector<int64_t> ids;

  void add(int64_t token, const bf16* row, bf16 own_bias, const bf16* embedding, int64_t hidden) {
    const int64_t room = (count / OUT + 1) * OUT;
    weight.resize(room * hidden);
    scales.resize(room);
    sums.resize(room);
    bias.resize(room, UNSEEN);
    embeddings.resize(room * hidden);
    ids.resize(room, token);
    pack_int8(row, count, hidden, weight.data(), &scales[count], &sums[count]);
    bias[count] = own_bias;
    std::memcpy(&embeddings[count * hidden], embedding, 2 * hidden);
    ids[count++] = token;
  }

  Matrix lm_head(int64_t hidden) const {
    return {weight.data(), scales.data(), sums.data(), bias.data(), hidden, int64_t(ids.size()), INT8};
  }
};

// What is kept of an answer from one draft to the next.
struct Memory {
  std::vector<Keys> keys;  // in order, by block and cached head
  int64_t done = 0;        // the first so many
  Own own;
};

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
  Memory* memory;
};

struct Plan {
  int64_t depth, width, most;
  double least, enough;  // as of `grow`
  const float* noise;    // [depth, tokens, the answer's own among them] or null
};

// The `most` best candidates.
struct Found {
  int64_t *tokens, *parents;
  double* scores;
};
}

namespace {

// What a node's row of logits comes to in one thread's share of the tokens.
struct Best {
  float most, sum;  // the largest logit, and the sum of exp(logit - most)
  std::vector<std::pair<float, int64_t>> tokens;  // the best, descending
};

// A thread's own memory.
struct Scratch {
  Halves rows, queries;
  Rows state, values, most, sums;
};
thread_local Scratch scratch;

class Draft {
 public:
  Draft(const Head& head, const Answer& answer, const Plan& plan)
      : head(head), answer(answer), own_head(answer.memory->own.lm_head(head.hidden)), plan(plan), kv(head.blocks) {}

  int64_t grow(const Found& found) {
    nodes = {-1};
    scores = {0.0};
    seen = {{}};
    embeddings.resize(head.hidden);
    widen(embeddings.data(), answer.root, head.hidden);
    best.resize(omp_get_max_threads());
    answer.memory->keys.resize(head.blocks * head.kv_heads);
    bool more = true;
#pragma omp parallel
    {
      const Thread own{omp_get_thread_num(), omp_get_num_threads()};
      read(own);
      for (int64_t level = 1; more; level++) {
        run(level, own);
        meeting.wait(own);
        if (own.i == 0) more = branch(level, own.n);
        meeting.wait(own);
      }
    }
    answer.memory->done = known();
    return give(found);
  }

 private:
  const Head& head;
  const Answer& answer;
  const Matrix own_head;
  const Plan& plan;

  struct Candidate {
    int64_t token;   // its number in the vocabulary of the head, or behind it among the answer's own
    int64_t node;    // its parent among its level's nodes
    int64_t parent;  // its parent among candidates
    double score;
  };
  std::vector<Candidate> found;            // so far
  int64_t appended = 0;                    // keys of nodes behind those of the answer
  std::vector<int64_t> nodes;              // of the level: candidates
  std::vector<double> scores;              // theirs
  std::vector<std::vector<int64_t>> seen;  // the appended keys that each of them sees
  Halves mask;                             // 0 or -inf [nodes, keys]
  Rows embeddings, newest;                 // theirs, and the states before them [nodes, hidden]
  Rows fused;                              // the answer's states [rows, hidden]
  Rows states;                             // what the level predicts [nodes, hidden]
  std::vector<Halves> kv;                  // keys and values of new slots [slots, 2 * kv_heads * head_dim], by block
  Halves product, query, attended, gate, up, logits, own_logits;
  std::vector<std::vector<Best>> best;     // [threads][nodes]
  Meeting meeting;

  // The best that are worth verifying, whose parents are; how many.
  int64_t give(const Found& to) const {
    std::vector<int64_t> order;
    for (size_t i = 0; i < found.size(); i++)
      if (found[i].score >= plan.least) order.push_back(i);  // NaN is not
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return found[a].score > found[b].score; });
    if (int64_t(order.size()) > plan.most) order.resize(plan.most);
    std::vector<int64_t> place(found.size());
    for (size_t i = 0; i < order.size(); i++) {
      const Candidate& of = found[order[i]];
      place[order[i]] = i;
      to.tokens[i] = of.token < head.tokens ? head.ids[of.token] : answer.memory->own.ids[of.token - head.tokens];
      to.parents[i] = of.parent < 0 ? -1 : place[of.parent];
      to.scores[i] = of.score;
    }
    return order.size();
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
  void prepare(const Resize& resize, const Thread& own) {
    if (own.i == 0) resize();
    meeting.wait(own);
  }

  // The answer's states as the head reads them.
  void read(const Thread& own) {
    const int64_t d = head.hidden, wide = head.layers * d, width = wide + d;
    prepare([&] {
      fused.resize(answer.rows * d);
      product.resize(answer.rows * d);
    }, own);
    Range range = own.outputs(d);
    if (wide) {
      scratch.rows.resize(answer.rows * wide);
      scratch.state.resize(d);
      for (int64_t m = 0; m < answer.rows; m++)
        for (int64_t i = 0; i < head.layers; i++) {
          widen(scratch.state.data(), answer.states + m * width + i * d, d);
          normed(&scratch.rows[m * wide + i * d], scratch.state.data(), head.layer_norms + i * d,
                 scale_of(scratch.state.data(), d, head.eps), d);
        }
      multiply(head.layer_proj, scratch.rows.data(), answer.rows, product.data(), own);
    }
    for (int64_t m = 0; m < answer.rows; m++)
      for (int64_t k = range.from; k < range.to; k += 16) {
        __m512 sum = Whole::load(answer.states + m * width + wide + k);
        if (wide) sum = _mm512_add_ps(sum, Whole::load(&product[m * d + k]));
        _mm512_storeu_ps(&fused[m * d + k], sum);
      }
    meeting.wait(own);
    if (own.i == 0) newest.assign(fused.end() - d, fused.end());
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
      own_logits.resize(n * own_head.out);
      states.resize(n * d);
    }, own);
    for (int64_t b = 0; slots && b < head.blocks; b++) {
      const Layer& layer = head.block[b];
      multiply(layer.key_value, norm(level == 1 ? fused : newest, layer.state_norm, slots), slots, kv[b].data(), own);
    }
    for (int64_t b = 0; b < head.blocks; b++) {
      const Layer& layer = head.block[b];
      multiply(layer.query, norm(b ? states : embeddings, layer.query_norm, n), n, query.data(), own);
      meeting.wait(own);
      const Range kv_heads = own.of(head.kv_heads);
      for (int64_t g = kv_heads.from; g < kv_heads.to; g++) {
        remember(level, b, g, slots);
        attend(level, b, g, n);
      }
      meeting.wait(own);
      add_attended(b, n, own);
      meeting.wait(own);
      feed_forward(b, n, own);
    meeting.wait(own);
    }
    scratch.rows.resize(n * d);
    for (int64_t k = 0; k < n * d; k += 16) to_half(&scratch.rows[k], _mm512_loadu_ps(&states[k]));
    const Inputs& inputs = taken(head.lm_head.kind, scratch.rows.data(), n, d);
    const Range range = inputs.multiply(head.lm_head, scratch.rows.data(), n, logits.data(), own);
    Range more{0, 0};
    if (own_head.out) more = inputs.multiply(own_head, scratch.rows.data(), n, own_logits.data(), own);
    best[own.i].resize(n);
    for (int64_t m = 0; m < n; m++) {
      const float* noise = plan.noise ? plan.noise + (level - 1) * (head.tokens + own_head.out) : nullptr;
      const Logits parts[2] = {{&logits[m * head.tokens], noise, 0, range},
                               {own_logits.data() + m * own_head.out, noise ? noise + head.tokens : nullptr, head.tokens, more}};
      scan(parts, best[own.i][m]);
    }
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

  // Attention of the query heads that meet one cached head.
  void attend(int64_t level, int64_t b, int64_t g, int64_t n) {
    const int64_t d = head.head_dim, group = head.heads / head.kv_heads, at = (answer.slot + level - 1) * d;
    const int64_t end = known() + appended;
    const int64_t rows = group * n;  // read the keys together: by head, then by node
    scratch.queries.resize(rows * d);
    scratch.values.resize(rows * d);
    scratch.most.resize(rows);
    scratch.sums.resize(rows);
    Keys& keys = answer.memory->keys[b * head.kv_heads + g];
    keys.order(cached(b, g, false), cached(b, g, true), 0, end, d, d, level == 1 ? answer.memory->done : known());
    const auto place = [&](int64_t r) { return (r % n * head.heads + g * group + r / n) * d; };
    for (int64_t r = 0; r < rows; r++)
      rotate(&scratch.queries[r * d], &query[place(r)], answer.cos + at, answer.sin + at, d);
    const Queries queries{scratch.queries.data(), rows, d, appended ? mask.data() : nullptr, end, n};
    Shaped shaped;
    keys.attend(shaped, queries, 1 / std::sqrt(float(d)), scratch.most.data(), scratch.sums.data(), scratch.values.data());
    for (int64_t r = 0; r < rows; r++)
      for (int64_t k = 0; k < d; k += 16)
        to_half(&attended[place(r) + k],
                _mm512_div_ps(_mm512_loadu_ps(&scratch.values[r * d + k]), _mm512_set1_ps(scratch.sums[r])));
  }

  // Attention's output and the residual, and in the first block the newest state.
  void add_attended(int64_t b, int64_t n, const Thread& own) {
    const int64_t d = head.hidden;
    const Range range = multiply(head.block[b].output, attended.data(), n, product.data(), own);
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
    const Inputs& inputs = taken(layer.gate.kind, scratch.rows.data(), n, d);
    const Range inner = inputs.multiply(layer.gate, scratch.rows.data(), n, gate.data(), own);
    inputs.multiply(layer.up, scratch.rows.data(), n, up.data(), own);
    for (int64_t m = 0; m < n; m++)
      activate(&gate[m * layer.gate.out + inner.from], &up[m * layer.gate.out + inner.from], inner.to - inner.from);
    meeting.wait(own);
    const Range range = multiply(layer.down, gate.data(), n, product.data(), own);
    for (int64_t m = 0; m < n; m++)
      for (int64_t k = m * d + range.from; k < m * d + range.to; k += 16)
        _mm512_storeu_ps(&states[k], _mm512_add_ps(_mm512_loadu_ps(&states[k]), Whole::load(&product[k])));
  }

  // A row of logits, whose first token has a number.
  struct Logits {
    const bf16* row;
    const float* noise;
    int64_t first;
    Range range;

    __m512 at(int64_t k) const {
      const __m512 x = Whole::load(row + k);
      return noise ? _mm512_add_ps(x, _mm512_loadu_ps(noise + k)) : x;
    }
  };

  void scan(const Logits (&parts)[2], Best& out) const {
    out.tokens.clear();
    float last = -INFINITY;  // what a token must be above
    for (const Logits& part : parts)
      for (int64_t k = part.range.from; k < part.range.to; k += 16) {
        const __m512 x = part.at(k);
        unsigned above = _mm512_cmp_ps_mask(x, _mm512_set1_ps(last), _CMP_GT_OQ);
        if (!above) continue;
        alignas(64) float lanes[16];
        _mm512_store_ps(lanes, x);
        for (; above; above &= above - 1) {
          const int i = __builtin_ctz(above);
          if (!(lanes[i] > last)) continue;
          const auto place = std::find_if(out.tokens.begin(), out.tokens.end(), [&](const auto& other) { return other.first < lanes[i]; });
          out.tokens.insert(place, {lanes[i], part.first + k + i});
          if (int64_t(out.tokens.size()) > plan.width) out.tokens.pop_back();
          if (int64_t(out.tokens.size()) == plan.width) last = out.tokens.back().first;
        }
      }
    out.most = out.tokens.empty() ? -INFINITY : out.tokens[0].first;
    __m512 sum = _mm512_setzero_ps();
    for (const Logits& part : parts)
      for (int64_t k = part.range.from; k < part.range.to; k += 16)
        sum = _mm512_add_ps(sum, exponential(_mm512_sub_ps(part.at(k), _mm512_set1_ps(out.most))));
    out.sum = _mm512_reduce_add_ps(sum);
  }

  // The level's candidates, and the nodes of the next one; whether there is one.
  bool branch(int64_t level, int64_t threads) {
    const int64_t first = found.size(), n = nodes.size();
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
      const int64_t children = std::min<int64_t>(plan.width, tokens.size());  // fewer than that: some logits are no numbers
      for (int64_t i = 0; i < children; i++)
        // rounding may put the log of a probability near 1 above 0, and a child before its parent
        found.push_back({tokens[i].second, m, nodes[m], scores[m] + std::min(tokens[i].first - total, 0.0)});
    }
    if (level == plan.depth) return false;
    std::vector<int64_t> order(found.size() - first);
    std::iota(order.begin(), order.end(), first);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return found[a].score > found[b].score; });
    if (int64_t(order.size()) > plan.width) order.resize(plan.width);
    if (plan.enough > 0) {
      double expected = 0;
      size_t worth = 0;
      for (; worth < order.size() && found[order[worth]].score >= plan.least; worth++) expected += std::exp(found[order[worth]].score);
      if (expected < plan.enough) return false;
      order.resize(worth);
    }
    descend(order);
    return !order.empty();
  }

  void descend(const std::vector<int64_t>& order) {
    const int64_t d = head.hidden, n = order.size();
    std::vector<std::vector<int64_t>> above = std::move(seen);
    seen.clear();
    newest.resize(n * d);
    embeddings.resize(n * d);
    nodes = order;
    scores.clear();
    for (int64_t i = 0; i < n; i++) {
      const auto [token, node, parent, score] = found[order[i]];
      std::copy_n(&states[node * d], d, &newest[i * d]);
      const bf16* own = answer.memory->own.embeddings.data();
      widen(&embeddings[i * d], token < head.tokens ? head.embeddings + token * d : own + (token - head.tokens) * d, d);
      scores.push_back(score);
      seen.push_back(above[node]);
      seen.back().push_back(appended + i);
    }
    appended += n;
    const int64_t end = known() + appended;
    mask.assign(n * end, 0);
    for (int64_t i = 0; i < n; i++) {
      std::fill_n(&mask[i * end + known()], appended, UNSEEN);
      for (int64_t key : seen[i]) mask[i * end + known() + key] = 0;
    }
  }
};

}  // namespace

extern "C" Memory* beagle_remember() { return new Memory; }

extern "C" void beagle_forget(Memory* memory) { delete memory; }

// Tokens of an answer's own behind those that it has: rows and biases [tokens] of the LM head, biases or null, and embeddings.
extern "C" void beagle_own(Memory* memory, const int64_t* tokens, const bf16* rows, const bf16* biases, const bf16* embeddings,
                           int64_t count, int64_t hidden) {
  for (int64_t i = 0; i < count; i++)
    memory->own.add(tokens[i], rows + i * hidden, biases ? biases[i] : bf16(0), embeddings + i * hidden, hidden);
}

extern "C" void beagle_disown(Memory* memory) { memory->own = {}; }

// The best candidates, parents before children; how many.
extern "C" int64_t beagle_draft(const Head* head, const Answer* answer, const Plan* plan, const Found* found) {
  return Draft(*head, *answer, *plan).grow(*found);
}
