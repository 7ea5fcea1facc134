// Products and attention of a few vectors for PyTorch and for graphs that inductor compiled, see products.h, attention.h.

#include <omp.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "choice.h"
#include "layers.h"
#include "shortlist.h"

namespace {

void* data(AtenTensorHandle tensor) {
  void* out = nullptr;
  aoti_torch_get_data_ptr(tensor, &out);
  return out;
}

int64_t outputs(AtenTensorHandle weight) {
  int64_t* sizes;
  aoti_torch_get_sizes(weight, &sizes);
  return sizes[0];
}

// y [rows, out] like x [rows, in]; shape becomes rows, out, in.
AOTITorchError new_output(AtenTensorHandle x, int64_t out, AtenTensorHandle* y, int64_t* shape) {
  int64_t* sizes;
  int32_t type;
  aoti_torch_get_dtype(x, &type);
  aoti_torch_get_sizes(x, &sizes);
  shape[0] = sizes[0];
  shape[1] = out;
  shape[2] = sizes[1];
  const int64_t strides[2] = {shape[1], 1};
  return aoti_torch_empty_strided(2, shape, strides, type, aoti_torch_device_type_cpu(), 0, y);
}

// So many of a product's pairs of blocks. Threads take what its rows become each for itself: waiting for another takes longer.
template <typename Work>
void multiply(const Matrix& m, const bf16* x, int64_t rows, int64_t pairs, const Work& work) {
  const int64_t threads = std::min<int64_t>(omp_get_max_threads(), pairs);
  if (pairs == 0) return;
  Shares shares(threads);
#pragma omp parallel num_threads(int(threads))
  {
    const Thread own{omp_get_thread_num(), omp_get_num_threads()};
    const Inputs& inputs = taken(m.kind, x, rows, m.in);
    Shaped shaped;
    shares.each(pairs, own, [&](int64_t i) { work(own.i, inputs, shaped, i); });
  }
}

void multiply(const Matrix& m, const void* x, int64_t rows, void* y) {
  const bf16* from = static_cast<const bf16*>(x);
  multiply(m, from, rows, pairs_of(m.out), [&](int64_t, const Inputs& inputs, Shaped& shaped, int64_t pair) {
    inputs.multiply(shaped, m, pair, from, rows, static_cast<bf16*>(y));
  });
}

void give(const Largest& found, void* values, int64_t* places, int64_t row) {
  places[row] = found.place;
  const __m128bh half = _mm_cvtneps_pbh(_mm_set1_ps(found.value));
  std::memcpy(static_cast<bf16*>(values) + row, &half, 2);
}

// The largest of each row, seen by several threads.
class Searches {
 public:
  explicit Searches(int64_t rows) : rows(rows), found(omp_get_max_threads() * rows) {}

  // Some outputs of all rows, which lie beside each other.
  void see(int64_t thread, const Halves& part, Range range) {
    for (int64_t r = 0; r < rows; r++)
      for (int64_t k = range.from; k < range.to; k += OUT)
        found[thread * rows + r].see(Whole::load(&part[r * 2 * OUT + k - range.from]), k);
  }

  void give(float* values, int64_t* places, int64_t outputs) {
    for (int64_t r = 0; r < rows; r++) {
      for (size_t i = rows + r; i < found.size(); i += rows) found[r].see(found[i]);
      const Largest largest = found[r].found(outputs);
      values[r] = largest.value;
      places[r] = largest.place;
    }
  }

 private:
  const int64_t rows;
  Lined<Search> found;  // [threads, rows]
};

// The pairs of blocks that may have the largest output of some row.
std::vector<int64_t> shortlisted(const Matrix& near, const float* left, const bf16* x, int64_t rows) {
  const int64_t threads = omp_get_max_threads();
  std::vector<float> sizes(rows);
  for (int64_t r = 0; r < rows; r++) sizes[r] = size_of(x + r * near.in, near.in);
  std::vector<Shortlist> lists(threads * rows);
  multiply(near, x, rows, pairs_of(near.out), [&](int64_t thread, const Inputs& inputs, Shaped& shaped, int64_t pair) {
    thread_local Halves part;
    part.resize(rows * 2 * OUT);
    const Range range = inputs.multiply(shaped, near, pair, x, rows, part.data(), 2 * OUT);
    for (int64_t r = 0; r < rows; r++)
      lists[thread * rows + r].see(&part[r * 2 * OUT], left + range.from, range.to - range.from, sizes[r], pair);
  });
  std::vector<char> marks(pairs_of(near.out));
  for (int64_t r = 0; r < rows; r++) {
    float least = -std::numeric_limits<float>::infinity();
    for (int64_t i = 0; i < threads; i++) least = std::max(least, lists[i * rows + r].at_least());
    for (int64_t i = 0; i < threads; i++) lists[i * rows + r].mark(least, marks);
  }
  std::vector<int64_t> pairs;
  for (size_t pair = 0; pair < marks.size(); pair++)
    if (marks[pair]) pairs.push_back(pair);
  return pairs;
}

}  // namespace

extern "C" {

// y [batch, heads, rows, outputs] of q [batch, heads, rows, inputs], both in one piece; k and v [batch, heads, keys, …]
// have rows in one piece. The mask is added to scores.
void attend(const void* q, const void* k, const void* v, const void* mask, void* y, const int64_t* sizes,
            const Strides* of_k, const Strides* of_v, const Strides* of_mask, double scale) {
  static thread_local Chunks chunks;
  Chunks& all = chunks;  // the same for all threads
  all.batch = sizes[0], all.heads = sizes[1], all.rows = sizes[2], all.keys = sizes[3], all.in = sizes[4], all.out = sizes[5];
  all.k = static_cast<const bf16*>(k), all.v = static_cast<const bf16*>(v), all.mask = static_cast<const bf16*>(mask);
  all.of_k = *of_k, all.of_v = *of_v, all.of_mask = *of_mask, all.scale = float(scale);
  all.make_room();
  const int threads = int(std::min<int64_t>(omp_get_max_threads(), all.tasks()));
#pragma omp parallel num_threads(threads)
  {
    const int64_t i = omp_get_thread_num(), n = omp_get_num_threads(), tasks = all.tasks(), rows = all.all_rows();
    Shaped shaped;
    for (int64_t t = tasks * i / n; t < tasks * (i + 1) / n; t++) all.sum(shaped, t, static_cast<const bf16*>(q));
#pragma omp barrier
    for (int64_t r = rows * i / n; r < rows * (i + 1) / n; r++) all.merge(r, all.shared(), static_cast<bf16*>(y) + r * all.out);
  }
}

// The largest of each row [rows, n] and the first place where it is; NaN if one of them is.
void largest(const void* x, void* values, int64_t* places, int64_t rows, int64_t n) {
#pragma omp parallel for
  for (int64_t r = 0; r < rows; r++) give(largest_of(static_cast<const bf16*>(x) + r * n, n), values, places, r);
}

// Gumbel noise of tokens [n] with each of some keys, out [keys, n].
void gumbel(const int64_t* keys, const int64_t* tokens, float* out, int64_t rows, int64_t n) {
  for (int64_t r = 0; r < rows; r++) fill_noise(keys[r], tokens, out + r * n, n);
}

// The token that is drawn from each row of logits [rows, n] with its key's noise, and the row's largest logit.
void draw(const void* logits, const int64_t* keys, float* values, int64_t* places, int64_t rows, int64_t n,
          double temperature) {
#pragma omp parallel for if (rows > 1)
  for (int64_t r = 0; r < rows; r++) {
    const Largest found = drawn(static_cast<const bf16*>(logits) + r * n, n, keys[r], temperature);
    values[r] = found.value;
    places[r] = found.place;
  }
}

// Slots of a cache [heads, slots, bytes], one after another to where they belong.
void move_slots(char* cache, const int64_t* from, const int64_t* to, int64_t moves, int64_t heads, int64_t slots, int64_t bytes) {
  for (int64_t h = 0; h < heads; h++, cache += slots * bytes)
    for (int64_t i = 0; i < moves; i++) std::memcpy(cache + to[i] * bytes, cache + from[i] * bytes, bytes);
}

// How often each pair of blocks of a bf16 weight [out, in] has each high byte, counts [pairs, 256] of zeros.
void count_high_bytes(const void* weight, int32_t* counts, int64_t in, int64_t out) {
#pragma omp parallel for
  for (int64_t p = 0; p < (out / OUT + 1) / 2; p++)
    count_high(static_cast<const bf16*>(weight), p, counts + 256 * p, in, out);
}

// A bf16 weight [out, in] as half.h describes it, into zeros that have their table and their numbers of patches.
void pack_weight(const void* weight, void* to, int64_t in, int64_t out) {
#pragma omp parallel for
  for (int64_t p = 0; p < (out / OUT + 1) / 2; p++)
    pack_half(static_cast<const bf16*>(weight), p, static_cast<uint8_t*>(to), in, out);
}

// What stands beside a bf16 weight [out, in], see shortlist.h: int8 tiles, scales, sums and bounds [out].
void pack_near_weight(const void* weight, int8_t* near, float* scales, int32_t* sums, float* left, int64_t in, int64_t out) {
#pragma omp parallel for
  for (int64_t o = 0; o < out; o++) {
    const bf16* row = static_cast<const bf16*>(weight) + o * in;
    left[o] = bound_of(row, in, pack_int8(row, o, in, near, scales + o, sums + o));
  }
}

// y [rows, out] = x [rows, in] · weight + bias [out] or null; the weight as half.h describes it; in a multiple of 32,
// out of 16.
void tiled_linear(const void* x, const void* weight, const void* bias, void* y, int64_t rows, int64_t in, int64_t out) {
  multiply({weight, nullptr, nullptr, static_cast<const bf16*>(bias), in, out, HALF}, x, rows, y);
}

// The same with int8 weights, which `scales [out]` scale and whose sums are `sums [out]`; in a multiple of 64.
void tiled_linear_int8(const void* x, const void* weight, const float* scales, const int32_t* sums, const void* bias,
                       void* y, int64_t rows, int64_t in, int64_t out) {
  multiply({weight, scales, sums, static_cast<const bf16*>(bias), in, out, INT8}, x, rows, y);
}

// The same with int4 weights; in a multiple of 64.
void tiled_linear_int4(const void* x, const void* weight, const void* bias, void* y, int64_t rows, int64_t in,
                       int64_t out) {
  multiply({weight, nullptr, nullptr, static_cast<const bf16*>(bias), in, out, INT4}, x, rows, y);
}

// The largest of each row of a product, x [rows, `stride`] of which `in` are its vectors, and the first place where it is; NaN
// if one of them is. The weight is that of one of the three above, by its kind. A bf16 weight may have an int8 one beside
// it, `near`, and what that leaves of each output, `left [out]`, see shortlist.h; else they are null.
void largest_of_product(const void* x, const void* weight, const float* scales, const int32_t* sums, const void* bias,
                        const void* near, const float* left, float* values, int64_t* places, int64_t rows, int64_t stride,
                        int64_t in, int64_t out, int64_t kind) {
  const bf16* own_bias = static_cast<const bf16*>(bias);
  Halves from(rows * in);
  for (int64_t r = 0; r < rows; r++) std::memcpy(&from[r * in], static_cast<const bf16*>(x) + r * stride, 2 * in);
  std::vector<int64_t> pairs;
  if (near) {
    pairs = shortlisted({near, scales, sums, own_bias, in, out, INT8}, left, from.data(), rows);
  } else {
    pairs.resize(pairs_of(out));
    for (size_t i = 0; i < pairs.size(); i++) pairs[i] = i;
  }
  const Matrix m{weight, scales, sums, own_bias, in, out, Kind(kind)};
  Searches searches(rows);
  multiply(m, from.data(), rows, pairs.size(), [&](int64_t thread, const Inputs& inputs, Shaped& shaped, int64_t i) {
    thread_local Halves part;
    part.resize(rows * 2 * OUT);
    searches.see(thread, part, inputs.multiply(shaped, m, pairs[i], from.data(), rows, part.data(), 2 * OUT));
  });
  searches.give(values, places, out);
}

// The same three for graphs that inductor compiled: weight [out, in], in int4 [out, in * 5 / 8] bytes, in bf16 all of its
// bytes; y new.
AOTITorchError aoti_torch_cpu_tiled_linear(AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* bias,
                                           int64_t out, AtenTensorHandle* y) {
  int64_t shape[3];
  AOTITorchError error = new_output(x, out, y, shape);
  if (!error) tiled_linear(data(x), data(weight), bias ? data(*bias) : nullptr, data(*y), shape[0], shape[2], shape[1]);
  return error;
}

AOTITorchError aoti_torch_cpu_tiled_linear_int8(AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle scales,
                                                AtenTensorHandle sums, AtenTensorHandle* bias, AtenTensorHandle* y) {
  int64_t shape[3];
  AOTITorchError error = new_output(x, outputs(weight), y, shape);
  if (!error)
    tiled_linear_int8(data(x), data(weight), static_cast<const float*>(data(scales)),
                      static_cast<const int32_t*>(data(sums)), bias ? data(*bias) : nullptr, data(*y), shape[0],
                      shape[2], shape[1]);
  return error;
}

AOTITorchError aoti_torch_cpu_tiled_linear_int4(AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* bias,
                                                AtenTensorHandle* y) {
  int64_t shape[3];
  AOTITorchError error = new_output(x, outputs(weight), y, shape);
  if (!error)
    tiled_linear_int4(data(x), data(weight), bias ? data(*bias) : nullptr, data(*y), shape[0], shape[2], shape[1]);
  return error;
}

AOTITorchError aoti_torch_cpu_attend(AtenTensorHandle q, AtenTensorHandle k, AtenTensorHandle v, AtenTensorHandle mask,
                                     double scale, AtenTensorHandle* y) {
  int64_t *of_q, *of_v, *of, *strides;
  int32_t type;
  Strides three[3];
  aoti_torch_get_dtype(q, &type);
  aoti_torch_get_sizes(q, &of_q);
  aoti_torch_get_sizes(v, &of_v);
  const int64_t sizes[6] = {of_q[0], of_q[1], of_q[2], of_v[2], of_q[3], of_v[3]};
  const AtenTensorHandle read[3] = {k, v, mask};
  for (int i = 0; i < 3; i++) {
    aoti_torch_get_strides(read[i], &strides);
    aoti_torch_get_sizes(read[i], &of);
    three[i] = {of[0] > 1 ? strides[0] : 0, of[1] > 1 ? strides[1] : 0, of[2] > 1 ? strides[2] : 0};
  }
  const int64_t whole[4] = {sizes[0], sizes[1], sizes[2], sizes[5]};
  const int64_t along[4] = {whole[1] * whole[2] * whole[3], whole[2] * whole[3], whole[3], 1};
  const AOTITorchError error = aoti_torch_empty_strided(4, whole, along, type, aoti_torch_device_type_cpu(), 0, y);
  if (!error) attend(data(q), data(k), data(v), data(mask), data(*y), sizes, &three[0], &three[1], &three[2], scale);
  return error;
}
}
