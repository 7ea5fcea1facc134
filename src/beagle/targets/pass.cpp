// A whole pass of a few tokens through layers of the common kind, for CPUs, in one parallel region: RMS norms, RoPE,
// grouped attention, a gated MLP.
//
// In a graph of operators half of a small pass is spent between its products. Here threads share the outputs of
// products, chunks of attention and rows, and wait for each other seven times a layer. What passes from layer to layer
// is rounded to bf16, as in the model.
//
// A token of a tree gets the bits that it would get alone, behind its path. So drafts change no bit of an answer: keys that
// a token sees are summed in the order of their positions, in chunks that begin at the same positions always. Whole chunks
// of the context are shared by all tokens. What is behind them is put together for tokens whose paths share it (paths.h).

#include <omp.h>

#include <optional>

#include "layers.h"
#include "paths.h"

extern "C" {

struct Layer {
  const float *attention_norm, *mlp_norm;  // [hidden]
  const float *query_norm, *key_norm;      // [head_dim] or null
  Matrix query_key_value, output, gate, up, down;
};

struct Model {
  int64_t hidden, heads, kv_heads, head_dim, layers, taps;
  double eps, scale;
  const float* norm;    // [hidden]
  const int64_t* tap;   // [taps], ascending: after how many layers the residual is given, too
  const Layer* layer;
};

struct Tokens {
  int64_t rows, done;          // nodes of a tree, and those before them, which an earlier pass has run
  const int64_t* parents;      // [done + rows], of the root -1
  const bf16* embeddings;      // [rows, hidden], or of the whole vocabulary
  const int64_t* ids;          // [rows], which rows of the vocabulary; or null
  bf16* states;                // [rows, (taps + 1) * hidden]
  const bf16 *cos, *sin;       // [positions, head_dim]
  int64_t context, head_size;  // slots before the root's, numbers of a head in the cache
  bf16* const* cache;          // keys and values of each layer in turn [kv_heads, slots, head_dim]
  double* seconds;             // null, or the sums of what a thread spends in each Part
};
}

namespace {

enum Part { PRODUCTS, ATTENTION, OTHERS, WAITING };

// A thread's own memory: keys of one head behind the shared ones.
struct Scratch {
  Keys near, far;  // those of the first chunk of them, and of the second
  Gathered behind;
  std::vector<uint32_t> left_out;  // of each block of them, the places whose values are no numbers
  int64_t head, sheet;             // which are in order in them
};
thread_local Scratch scratch;

class Pass {
 public:
  Pass(const Model& model, const Tokens& tokens) : model(model), tokens(tokens), group(model.heads / model.kv_heads) {}

  void run() {
    const int64_t n = tokens.rows, d = model.hidden;
    const int64_t wide = (model.heads + 2 * model.kv_heads) * model.head_dim;
    x.resize(n * d);
    for (int64_t m = 0; m < n; m++) widen(&x[m * d], tokens.embeddings + (tokens.ids ? tokens.ids[m] : m) * d, d);
    normed_rows.resize(n * d);
    product.resize(n * std::max(d, wide));
    query.resize(n * model.heads * model.head_dim);
    attended.resize(query.size());
    gate.resize(n * model.layer[0].gate.out);
    up.resize(gate.size());
    inputs.make_room(n, std::max({d, model.heads * model.head_dim, model.layer[0].gate.out}));
    find_paths();
    base = tokens.context / CHUNK * CHUNK;
    sheets.emplace(paths, tokens.context, base, group);
    chunks.batch = 1, chunks.heads = model.kv_heads, chunks.rows = n * group;
    chunks.keys = base, chunks.in = chunks.out = model.head_dim, chunks.scale = float(model.scale);
    chunks.of_k = chunks.of_v = {0, tokens.head_size, 0};
    chunks.mask = nullptr, chunks.own = 2;
    chunks.make_room();
#pragma omp parallel
    {
      const Thread own{omp_get_thread_num(), omp_get_num_threads()};
      Shaped shaped;
      if (own.i == 0) last = omp_get_wtime();
      for (int64_t l = 0, tap = 0; l < model.layers; l++) {
        attend(shaped, l, own);
        feed_forward(shaped, model.layer[l], own);
        if (tap < model.taps && model.tap[tap] == l + 1) {
          const Range rows = own.of(n);
          for (int64_t m = rows.from; m < rows.to; m++) give(m, tap, &x[m * d]);
          tap++;
        }
      }
      const Range rows = own.of(n);
      for (int64_t m = rows.from; m < rows.to; m++)
        normed(state(m, model.taps), &x[m * d], model.norm, scale_of(&x[m * d], d, model.eps), d);
      spent(OTHERS, own);
    }
  }

 private:
  const Model& model;
  const Tokens& tokens;
  const int64_t group;  // query heads that share a cached head
  int64_t base;         // the first slot behind the chunks that all tokens share
  std::vector<std::vector<int64_t>> paths;  // of each token: nodes from the root to itself
  Rows x;                                   // the residual [rows, hidden]
  Halves normed_rows, product, attended, gate, up;
  Halves query;  // [kv_heads, rows, group, head_dim]
  Inputs inputs;
  Chunks chunks;
  std::optional<Sheets> sheets;
  Shares shares{omp_get_max_threads()};
  Meeting meeting;
  double last;  // when the first thread came to its present part

  void spent(Part part, const Thread& own) {
    if (own.i || !tokens.seconds) return;
    const double now = omp_get_wtime();
    tokens.seconds[part] += now - last;
    last = now;
  }

  // After a part, threads wait for each other.
  void meet(Part part, const Thread& own) {
    spent(part, own);
    meeting.wait(own);
    spent(WAITING, own);
  }

  bf16* state(int64_t m, int64_t part) const { return tokens.states + (m * (model.taps + 1) + part) * model.hidden; }

  void give(int64_t m, int64_t part, const float* row) const {
    for (int64_t k = 0; k < model.hidden; k += 16) to_half(state(m, part) + k, _mm512_loadu_ps(row + k));
  }

  void find_paths() {
    for (int64_t m = 0; m < tokens.rows; m++) {
      std::vector<int64_t> path;
      for (int64_t node = tokens.done + m; node >= 0; node = tokens.parents[node]) path.push_back(node);
      paths.emplace_back(path.rbegin(), path.rend());
    }
  }

  int64_t position(int64_t m) const { return tokens.context + paths[m].size() - 1; }

  int64_t slot(int64_t m) const { return tokens.context + tokens.done + m; }

  // Normed rows for a product: threads share them, and each needs all of them.
  void norm(const float* weight, const Matrix& matrix, const Thread& own) {
    const int64_t d = model.hidden;
    const Range rows = own.of(tokens.rows);
    for (int64_t m = rows.from; m < rows.to; m++)
      normed(&normed_rows[m * d], &x[m * d], weight, scale_of(&x[m * d], d, model.eps), d);
    inputs.take(matrix.kind, normed_rows.data(), tokens.rows, d, rows);
    meet(OTHERS, own);
  }

  Range multiply(Shaped& shaped, const Matrix& matrix, int64_t pair, const Halves& rows, Halves& out) const {
    return inputs.multiply(shaped, matrix, pair, rows.data(), tokens.rows, out.data());
  }

  static __m512 rounded(__m512 sum) {
    const __m256bh half = _mm512_cvtneps_pbh(sum);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)half), 16));
  }

  // A product is added to the residual.
  void add(Shaped& shaped, const Matrix& matrix, const Halves& rows, const Thread& own) {
    const int64_t d = model.hidden;
    if (matrix.kind != HALF) {
      inputs.take(matrix.kind, rows.data(), tokens.rows, matrix.in, own.of(tokens.rows));
      meet(OTHERS, own);
    }
    shares.each(pairs_of(matrix.out), own, [&](int64_t pair) {
      const Range range = multiply(shaped, matrix, pair, rows, product);
      for (int64_t m = 0; m < tokens.rows; m++)
        for (int64_t k = m * d + range.from; k < m * d + range.to; k += 16)
          _mm512_storeu_ps(&x[k], rounded(_mm512_add_ps(_mm512_loadu_ps(&x[k]), Whole::load(&product[k]))));
    });
    meet(PRODUCTS, own);
  }

  void attend(Shaped& shaped, int64_t l, const Thread& own) {
    const Layer& layer = model.layer[l];
    const int64_t d = model.head_dim, wide = layer.query_key_value.out;
    norm(layer.attention_norm, layer.query_key_value, own);
    shares.each(pairs_of(wide), own, [&](int64_t pair) { multiply(shaped, layer.query_key_value, pair, normed_rows, product); });
    if (own.i == 0) {
      chunks.k = tokens.cache[2 * l];
      chunks.v = tokens.cache[2 * l + 1];
    }
    meet(PRODUCTS, own);
    const Range heads = own.of((model.heads + 2 * model.kv_heads) * tokens.rows);
    for (int64_t i = heads.from; i < heads.to; i++) {
      const int64_t h = i / tokens.rows, m = i % tokens.rows;
      place(l, h, m, &product[m * wide + h * d]);
    }
    meet(OTHERS, own);
    const int64_t n = tokens.rows, tasks = sheets->tasks.size();
    const Range rows = own.of(chunks.all_rows());
    scratch.head = -1;
    shares.each(chunks.tasks() + model.kv_heads * tasks, own, [&](int64_t t) {
      if (t < chunks.tasks()) return chunks.sum(shaped, t, query.data());
      t -= chunks.tasks();
      sum_paths(shaped, t / tasks, sheets->tasks[t % tasks]);
    });
    meet(ATTENTION, own);
    for (int64_t r = rows.from; r < rows.to; r++) {
      const int64_t m = r / group % n, h = r / (group * n) * group + r % group;
      const int64_t all = position(m) / CHUNK + 1;
      chunks.merge(r, all, &attended[(m * model.heads + h) * d]);
    }
    meet(ATTENTION, own);
    add(shaped, layer.output, attended, own);
  }

  // Some tokens' queries of a cached head over the keys behind the shared chunks.
  void sum_paths(Shaped& shaped, int64_t head, const Task& task) {
    const int64_t d = model.head_dim;
    const Sheet& sheet = sheets->sheets[task.sheet];
    const int64_t places = sheet.slots.size(), near = sheets->places_near(sheet);
    if (scratch.head != head || scratch.sheet != task.sheet) gather(head, task.sheet);
    Queries queries{&query[(head * tokens.rows + task.first) * group * d], task.tokens * group, d, nullptr, 0, 0};
    queries.path_rows = group;
    queries.paths = &sheets->near[task.first];
    chunks.sum(shaped, scratch.near, head, chunks.shared(), queries, task.first * group);
    spoil(head, chunks.shared(), task, sheets->near, 0);
    if (near == places) return;
    queries.paths = &sheets->far[task.first];
    chunks.sum(shaped, scratch.far, head, chunks.shared() + 1, queries, task.first * group);
    spoil(head, chunks.shared() + 1, task, sheets->far, near / BLOCK);
  }

  // Tokens of a task that see in a chunk what was left out, whose blocks begin with one.
  void spoil(int64_t head, int64_t chunk, const Task& task, const std::vector<Path>& paths, int64_t block) {
    for (int64_t m = task.first; m < task.first + task.tokens; m++)
      for (size_t b = 0; b < paths[m].blocks.size(); b++)
        if (scratch.left_out[block + b] & paths[m].blocks[b].seen) chunks.spoil(head, chunk, m * group, group);
  }

  // A sheet's keys of a cached head in order.
  void gather(int64_t head, int64_t number) {
    const int64_t d = model.head_dim;
    const bf16 *k = chunks.k + head * tokens.head_size, *v = chunks.v + head * tokens.head_size;
    const Sheet& sheet = sheets->sheets[number];
    const int64_t places = sheet.slots.size(), near = sheets->places_near(sheet);
    if (scratch.head != head) scratch.near.order(k, v, base, base + sheets->before(), d, d);
    scratch.head = head;
    scratch.sheet = number;
    Gathered& own = scratch.behind;
    own.keys.assign(places * d, 0);
    own.values.assign(places * d, 0);
    scratch.left_out.assign(places / BLOCK, 0);
    for (int64_t i = 0; i < places; i++) {
      const int64_t slot = sheet.slots[i];
      if (slot < 0) continue;
      std::memcpy(&own.keys[i * d], k + slot * d, 2 * d);
      if (sheet.tokens > 1 && slot >= tokens.context && !is_finite(v + slot * d, d))
        scratch.left_out[i / BLOCK] |= uint32_t(1) << i % BLOCK;
      else
        std::memcpy(&own.values[i * d], v + slot * d, 2 * d);
    }
    scratch.near.append(own.keys.data(), own.values.data(), sheets->before(), near);
    if (near < places) scratch.far.order(own.keys.data() + near * d, own.values.data() + near * d, 0, places - near, d, d);
  }

  // A head's part of a token's product to where attention finds it.
  void place(int64_t l, int64_t h, int64_t m, bf16* part) {
    const int64_t d = model.head_dim, key = h - model.heads, value = key - model.kv_heads;
    if (value >= 0) {
      std::memcpy(tokens.cache[2 * l + 1] + value * tokens.head_size + slot(m) * d, part, 2 * d);
      return;
    }
    const Layer& layer = model.layer[l];
    if (layer.query_norm) {
      thread_local Rows row;
      row.resize(d);
      widen(row.data(), part, d);
      normed(part, row.data(), key < 0 ? layer.query_norm : layer.key_norm, scale_of(row.data(), d, model.eps), d);
    }
    bf16* to = key < 0 ? &query[((h / group * tokens.rows + m) * group + h % group) * d]
                       : tokens.cache[2 * l] + key * tokens.head_size + slot(m) * d;
    rotate(to, part, tokens.cos + position(m) * d, tokens.sin + position(m) * d, d);
  }

  void feed_forward(Shaped& shaped, const Layer& layer, const Thread& own) {
    norm(layer.mlp_norm, layer.gate, own);
    shares.each(pairs_of(layer.gate.out), own, [&](int64_t pair) {
      const Range range = multiply(shaped, layer.gate, pair, normed_rows, gate);
      multiply(shaped, layer.up, pair, normed_rows, up);
      for (int64_t m = 0; m < tokens.rows; m++)
        activate(&gate[m * layer.gate.out + range.from], &up[m * layer.gate.out + range.from], range.to - range.from);
    });
    meet(PRODUCTS, own);
    add(shaped, layer.down, gate, own);
  }
};

}  // namespace

extern "C" void beagle_pass(const Model* model, const Tokens* tokens) {
  Pass(*model, *tokens).run();
}
