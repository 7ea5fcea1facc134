// Products and attention of a few vectors for PyTorch and for graphs that inductor compiled, see products.h, attention.h.

#include <omp.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "attention.h"

namespace {

void* data(AtenTensorHandle tensor) {
  void* out = nullptr;
  aoti_torch_get_data_ptr(tensor, &out);
  return out;
}

// y [rows, out] like x [rows, in], for a weight [out, …]; shape becomes rows, out, in.
AOTITorchError new_output(AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* y, int64_t* shape) {
  int64_t *sizes, *outputs;
  int32_t type;
  aoti_torch_get_dtype(x, &type);
  aoti_torch_get_sizes(x, &sizes);
  aoti_torch_get_sizes(weight, &outputs);
  shape[0] = sizes[0];
  shape[1] = outputs[0];
  shape[2] = sizes[1];
  const int64_t strides[2] = {shape[1], 1};
  return aoti_torch_empty_strided(2, shape, strides, type, aoti_torch_device_type_cpu(), 0, y);
}

constexpr int64_t CHUNK = 128;  // keys whose weighted values are summed by themselves

struct Strides {
  int64_t batch, head, row;
};

}  // namespace

extern "C" {

// y [batch, heads, rows, outputs] of q [batch, heads, rows, inputs], both in one piece; k and v [batch, heads, keys, …]
// have rows in one piece. The mask is added to scores. Chunks of keys are summed by themselves, and their sums in order:
// so what a query gets does not depend on the threads, nor on keys behind those that it sees.
void attend(const void* q, const void* k, const void* v, const void* mask, void* y, const int64_t* sizes,
            const Strides* of_k, const Strides* of_v, const Strides* of_mask, double scale) {
  const int64_t batch = sizes[0], heads = sizes[1], rows = sizes[2], keys = sizes[3], in = sizes[4], out = sizes[5];
  const int64_t chunks = (keys + CHUNK - 1) / CHUNK, tasks = batch * heads * chunks, all = batch * heads * rows;
  const int threads = int(std::min<int64_t>(omp_get_max_threads(), tasks));
  static thread_local std::vector<float> most, sums, parts;  // [batch, heads, chunks, rows], of parts [..., outputs]
  most.resize(tasks * rows);
  sums.resize(tasks * rows);
  parts.resize(tasks * rows * out);
  float *largest = most.data(), *weights = sums.data(), *part = parts.data();
#pragma omp parallel num_threads(threads)
  {
    const int64_t i = omp_get_thread_num(), n = omp_get_num_threads();
    thread_local Keys own;
    for (int64_t task = tasks * i / n; task < tasks * (i + 1) / n; task++) {
      const int64_t head = task / chunks, from = task % chunks * CHUNK, b = head / heads, h = head % heads;
      own.order(static_cast<const bf16*>(k) + b * of_k->batch + h * of_k->head,
                static_cast<const bf16*>(v) + b * of_v->batch + h * of_v->head, from, std::min(from + CHUNK, keys), in, out);
      const bf16* added = static_cast<const bf16*>(mask) + b * of_mask->batch + h * of_mask->head;
      own.attend({static_cast<const bf16*>(q) + head * rows * in, rows, in, added, of_mask->row}, float(scale),
                 largest + task * rows, weights + task * rows, part + task * rows * out);
    }
#pragma omp barrier
    for (int64_t r = all * i / n; r < all * (i + 1) / n; r++) {
      const int64_t first = r / rows * chunks * rows + r % rows;  // its place in the first chunk
      float top = largest[first], sum = 0;
      for (int64_t j = 1; j < chunks; j++) top = std::max(top, largest[first + j * rows]);
      for (int64_t j = 0; j < chunks; j++) {
        float& share = largest[first + j * rows];
        share = std::exp(share - top);
        sum += share * weights[first + j * rows];
      }
      for (int64_t c = 0; c < out; c += 16) {
        __m512 total = _mm512_setzero_ps();
        for (int64_t j = 0; j < chunks; j++)
          total = _mm512_fmadd_ps(_mm512_set1_ps(largest[first + j * rows]), _mm512_loadu_ps(part + (first + j * rows) * out + c), total);
        to_half(static_cast<bf16*>(y) + r * out + c, _mm512_div_ps(total, _mm512_set1_ps(sum)));
      }
    }
  }
}

// y [rows, out] = x [rows, in] · weight + bias [out] or null; the weight in tiles, 64-byte aligned; in a multiple of
// 32, out of 16.
void tiled_linear(const void* x, const void* weight, const void* bias, void* y, int64_t rows, int64_t in, int64_t out) {
  const int64_t blocks = out / OUT, pairs = (blocks + 1) / 2;
  const int threads = int(std::min<int64_t>(omp_get_max_threads(), pairs));
#pragma omp parallel num_threads(threads)
  {
    const int64_t i = omp_get_thread_num(), n = omp_get_num_threads();
    share(static_cast<const bf16*>(weight), static_cast<const bf16*>(x), static_cast<bf16*>(y),
          static_cast<const bf16*>(bias), rows, in, out, pairs * i / n * 2, std::min(pairs * (i + 1) / n * 2, blocks));
  }
}

// The same with int8 weights, which `scales [out]` scale and whose sums are `sums [out]`; in a multiple of 64.
void tiled_linear_int8(const void* x, const void* weight, const float* scales, const int32_t* sums, const void* bias,
                       void* y, int64_t rows, int64_t in, int64_t out) {
  const int64_t blocks = out / OUT, pairs = (blocks + 1) / 2;
  const int threads = int(std::min<int64_t>(omp_get_max_threads(), pairs));
#pragma omp parallel num_threads(threads)
  {
    thread_local Whole whole;
    whole.of(static_cast<const bf16*>(x), rows, in);  // each thread for itself: waiting for another takes longer
    const int64_t i = omp_get_thread_num(), n = omp_get_num_threads();
    share_whole(static_cast<const int8_t*>(weight), whole, static_cast<bf16*>(y), scales, sums,
                static_cast<const bf16*>(bias), rows, in, out, pairs * i / n * 2,
                std::min(pairs * (i + 1) / n * 2, blocks));
  }
}

// The same with int4 weights; in a multiple of 64.
void tiled_linear_int4(const void* x, const void* weight, const void* bias, void* y, int64_t rows, int64_t in,
                       int64_t out) {
  const int64_t blocks = out / OUT;
  const int threads = int(std::min<int64_t>(omp_get_max_threads(), blocks));
#pragma omp parallel num_threads(threads)
  {
    thread_local Groups groups;
    groups.of(static_cast<const bf16*>(x), rows, in);
    const int64_t i = omp_get_thread_num(), n = omp_get_num_threads();
    share_int4(static_cast<const uint8_t*>(weight), groups, static_cast<bf16*>(y),
               static_cast<const bf16*>(bias), rows, in, out, blocks * i / n, blocks * (i + 1) / n);
  }
}

// The same three for graphs that inductor compiled: weight [out, in], in int4 [out, in * 5 / 8] bytes; y new.
AOTITorchError aoti_torch_cpu_tiled_linear(AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* bias,
                                           AtenTensorHandle* y) {
  int64_t shape[3];
  AOTITorchError error = new_output(x, weight, y, shape);
  if (!error) tiled_linear(data(x), data(weight), bias ? data(*bias) : nullptr, data(*y), shape[0], shape[2], shape[1]);
  return error;
}

AOTITorchError aoti_torch_cpu_tiled_linear_int8(AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle scales,
                                                AtenTensorHandle sums, AtenTensorHandle* bias, AtenTensorHandle* y) {
  int64_t shape[3];
  AOTITorchError error = new_output(x, weight, y, shape);
  if (!error)
    tiled_linear_int8(data(x), data(weight), static_cast<const float*>(data(scales)),
                      static_cast<const int32_t*>(data(sums)), bias ? data(*bias) : nullptr, data(*y), shape[0],
                      shape[2], shape[1]);
  return error;
}

AOTITorchError aoti_torch_cpu_tiled_linear_int4(AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* bias,
                                                AtenTensorHandle* y) {
  int64_t shape[3];
  AOTITorchError error = new_output(x, weight, y, shape);
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
