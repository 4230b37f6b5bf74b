// Attention of the few queries of a decoding step, float32 or bfloat16.
//
// A query passes over the keys that it sees, in the order of their slots, and over nothing else: neither the queries beside it
// nor the slots that are hidden from it have any part in its result. With `few_rows` this makes a step of several tokens equal,
// bit for bit, to as many steps of one.

namespace {

// The weighted sum of N * 16 columns of the values that are seen.
template <int N, typename T>
void gather(const T* values, int64_t step, const std::vector<int32_t>& seen, const float* weights, float scale, float* out) {
  Lanes total[2 * N] = {};
  for (size_t c = 0; c < seen.size(); c++) {
    const T* value = values + seen[c] * step;
    const Lanes weight = Lanes{} + weights[c];
    for (int j = 0; j < N; j++) {
      total[2 * j] = fused(one(value + j * STRIDE), weight, total[2 * j]);
      total[2 * j + 1] = fused(two(value + j * STRIDE), weight, total[2 * j + 1]);
    }
  }
  for (int j = 0; j < 2 * N; j++) *reinterpret_cast<LooseLanes*>(out + j * STRIDE / 2) = total[j] * scale;
}

// One query, (width,) in the order of `unpack`, as is the result; scores: room for as many as are seen, and 8 more.
template <typename T>
void attend(const float* query, const T* keys, int64_t key_step, const T* values, int64_t value_step,
            const std::vector<int32_t>& seen, int64_t width, float scaling, float* scores, float* out) {
  const int64_t count = seen.size();
  float most = -INFINITY;
  for (int64_t c = 0; c < count; c += 8) {
    Lanes total[8] = {};
    for (int64_t j = 0; j < std::min<int64_t>(8, count - c); j++) {
      const T* key = keys + seen[c + j] * key_step;
      for (int64_t k = 0; k < width; k += STRIDE) {
        total[j] = fused(one(key + k), load(query + k), total[j]);
        total[j] = fused(two(key + k), load(query + k + STRIDE / 2), total[j]);
      }
    }
    const Lanes sum = sums(total);
    for (int j = 0; j < 8; j++) {
      scores[c + j] = c + j < count ? sum[LANE_OF[j]] * scaling : -INFINITY;
      most = std::max(most, scores[c + j]);
    }
  }
  Lanes totals[8] = {};
  for (int64_t c = 0; c < count; c += 8) {
    const Lanes weights = exponential(load(scores + c) - most);
    *reinterpret_cast<LooseLanes*>(scores + c) = weights;
    totals[0] += weights;
  }
  const float scale = count ? 1.0f / sums(totals)[0] : 0.0f;
  for (int64_t k = 0; k < width; k += 4 * STRIDE) {
    const int64_t left = (width - k) / STRIDE;
    if (left >= 4) gather<4>(values + k, value_step, seen, scores, scale, out + k);
    else if (left == 3) gather<3>(values + k, value_step, seen, scores, scale, out + k);
    else if (left == 2) gather<2>(values + k, value_step, seen, scores, scale, out + k);
    else gather<1>(values + k, value_step, seen, scores, scale, out + k);
  }
}

void pack(const float* from, float* to, int64_t count) { std::copy(from, from + count, to); }
void pack(const float* from, uint16_t* to, int64_t count) {
  for (int64_t i = 0; i < count; i += STRIDE)
    for (int64_t j = 0; j < STRIDE / 2; j++) {
      to[i + 2 * j] = rounded(from[i + j]);
      to[i + 2 * j + 1] = rounded(from[i + STRIDE / 2 + j]);
    }
}

template <typename T>
void attend_all(const View& query, const View& key, const View& value, const View& mask, float scaling, T* to) {
  const int64_t heads = query.sizes[1], count = query.sizes[2], width = query.sizes[3], slots = key.sizes[2];
  const int64_t sharing = heads / key.sizes[1];
  const T *q = query.as<T>(), *k = key.as<T>(), *v = value.as<T>();
  const bool* m = mask.as<bool>();
  const int64_t grain = std::max<int64_t>(1, (1 << 15) / (slots * width));
  shared(query.sizes[0] * count * heads, grain, [&](int64_t first, int64_t last) {
    thread_local std::vector<int32_t> seen;
    float* const scores = scratch(slots + 8 + 2 * width);
    float *const from = scores + slots + 8, *const out = from + width;
    for (int64_t place = first; place < last; place++) {  // (row, query, head), as the result lies in memory
      const int64_t h = place % heads, i = place / heads % count, b = place / heads / count;
      if (h == 0 || place == first) {
        const bool* visible = m + (mask.sizes[0] > 1 ? b * mask.strides[0] : 0) + i * mask.strides[2];
        seen.clear();
        for (int64_t s = 0; s < slots; s++)
          if (visible[s * mask.strides[3]]) seen.push_back(s);
      }
      unpack(q + b * query.strides[0] + h * query.strides[1] + i * query.strides[2], from, width);
      attend(from, k + b * key.strides[0] + h / sharing * key.strides[1], key.strides[2],
             v + b * value.strides[0] + h / sharing * value.strides[1], value.strides[2], seen, width, scaling, scores, out);
      pack(out, to + place * width, width);
    }
  });
}

// query: (rows, heads, queries, width), key and value: (rows, fewer heads, slots, width), mask: (rows or 1, 1, queries, slots)
// bool -> (rows, queries, heads, width). width is a multiple of 16.
AtenTensorHandle few_queries(AtenTensorHandle query, AtenTensorHandle key, AtenTensorHandle value, AtenTensorHandle mask,
                             double scaling) {
  const View q(query), k(key), v(value);
  if (q.strides[3] != 1) return few_queries(torch::stable::contiguous(borrowed(query)).get(), key, value, mask, scaling);
  if (k.strides[3] != 1) return few_queries(query, torch::stable::contiguous(borrowed(key)).get(), value, mask, scaling);
  if (v.strides[3] != 1) return few_queries(query, key, torch::stable::contiguous(borrowed(value)).get(), mask, scaling);
  const int64_t shape[] = {q.sizes[0], q.sizes[2], q.sizes[1], q.sizes[3]};
  const AtenTensorHandle result = empty(shape, 4, q.dtype);
  const View to(result);
  if (q.dtype == aoti_torch_dtype_float32()) attend_all(q, k, v, View(mask), scaling, to.as<float>());
  else attend_all(q, k, v, View(mask), scaling, to.as<uint16_t>());
  return result;
}

Tensor few_queries_of(Tensor query, Tensor key, Tensor value, Tensor mask, double scaling) {
  return Tensor(few_queries(query.get(), key.get(), value.get(), mask.get(), scaling));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dynamo_lm, library) {
  library.def("few_queries(Tensor query, Tensor key, Tensor value, Tensor mask, float scaling) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(dynamo_lm, CPU, library) { library.impl("few_queries", TORCH_BOX(&few_queries_of)); }

extern "C" __attribute__((visibility("default"))) AOTITorchError aoti_torch_cpu_few_queries(
    AtenTensorHandle query, AtenTensorHandle key, AtenTensorHandle value, AtenTensorHandle mask, double scaling,
    AtenTensorHandle* result) {
  return guarded([&] { *result = few_queries(query, key, value, mask, scaling); });
}
