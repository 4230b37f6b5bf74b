// Attention of the few queries of a decoding step, float32 or bfloat16.
//
// A query passes over the keys that it sees, in the order of their slots, and over nothing else: neither the queries beside it
// nor the slots that are hidden from it have any part in its result. With `skinny_matmul` this makes a step of several tokens equal,
// bit for bit, to as many steps of one. Queries that see the same slots, but for the last few, pass over them together: a key
// is then loaded once for all of them.

namespace {

constexpr int64_t TOGETHER = 4;  // queries, in all heads that share keys; more sums do not fit the registers

template <int R>
using Several = std::integral_constant<int, R>;

constexpr int64_t AHEAD = 32;    // keys; their values are asked for as the keys are read, and are in the caches when all scores are known

// Asks for entries that will be read soon.
template <typename T>
inline void soon(const T* at, int64_t count) {
  for (int64_t k = 0; k < count; k += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(at + k);
}

struct Range {  // slots that are attended to: all from one on
  int64_t begin;
  int64_t operator()(int64_t c) const { return begin + c; }
};

struct List {  // or those on a list
  const int32_t* slots;
  int64_t operator()(int64_t c) const { return slots[c]; }
};

// Columns [0, N * 16) of the weighted sums of R queries. counts: how many of the slots each of them sees; weights: (R, step).
template <int R, int N, typename T, typename S>
void gather(const T* values, int64_t value_step, const S& slot, const int64_t* counts, const float* weights, int64_t step,
            const float* scale, float* out, int64_t width) {
  Lanes total[R][2 * N] = {};
  const int64_t common = *std::min_element(counts, counts + R), most = *std::max_element(counts, counts + R);
  const auto add = [&](int64_t c, auto attended) {
    const T* value = values + slot(c) * value_step;
    Lanes v[2 * N];
    for (int j = 0; j < N; j++) {
      v[2 * j] = held(one(value + j * STRIDE));
      v[2 * j + 1] = held(two(value + j * STRIDE));
    }
    for (int r = 0; r < R; r++) {
      if (!attended(r)) continue;
      const Lanes weight = Lanes{} + weights[r * step + c];
      for (int j = 0; j < 2 * N; j++) total[r][j] = fused(v[j], weight, total[r][j]);
    }
  };
  for (int64_t c = 0; c < common; c++) add(c, [](int) { return true; });
  for (int64_t c = common; c < most; c++) add(c, [&](int r) { return c < counts[r]; });
  for (int r = 0; r < R; r++)
    for (int j = 0; j < 2 * N; j++) *reinterpret_cast<LooseLanes*>(out + r * width + j * STRIDE / 2) = total[r][j] * scale[r];
}

// R queries, (R, width) in the order of `unpack`, as is the result; scores: room for (R, step), where step is 8 more than slots.
template <int R, typename T, typename S>
void attend(const float* query, const T* keys, int64_t key_step, const T* values, int64_t value_step, const S& slot,
            const int64_t* counts, int64_t width, float scaling, float* scores, int64_t step, float* out) {
  constexpr int KEYS = 8 / R;  // at a time: eight sums in registers
  const int64_t most = *std::max_element(counts, counts + R);
  for (int64_t c = 0; c < most; c += KEYS) {
    Lanes total[8] = {};
    const T* key[KEYS];
    for (int j = 0; j < KEYS; j++) {
      const int64_t at = slot(std::min(c + j, most - 1));
      key[j] = keys + at * key_step;
      soon(keys + slot(std::min(c + j + AHEAD, most - 1)) * key_step, width);
      soon(values + at * value_step, width);
    }
    for (int64_t k = 0; k < width; k += STRIDE) {
      Lanes first[KEYS], second[KEYS];
      for (int j = 0; j < KEYS; j++) first[j] = one(key[j] + k), second[j] = two(key[j] + k);
      for (int r = 0; r < R; r++) {
        const Lanes a = load(query + r * width + k), b = load(query + r * width + k + STRIDE / 2);
        for (int j = 0; j < KEYS; j++)
          total[r * KEYS + j] = fused(second[j], b, fused(first[j], a, total[r * KEYS + j]));
      }
    }
    const Lanes sum = sums(total);
    for (int i = 0; i < R * KEYS; i++) scores[i / KEYS * step + c + i % KEYS] = sum[i] * scaling;
  }
  float scale[R];
  for (int r = 0; r < R; r++) {
    float* const line = scores + r * step;
    const int64_t count = counts[r];
    std::fill(line + count, line + (count + 7) / 8 * 8, -INFINITY);
    const float highest = count ? *std::max_element(line, line + count) : 0.0f;
    Lanes totals[8] = {};
    for (int64_t c = 0; c < count; c += 8) {
      const Lanes weights = exponential(load(line + c) - highest);
      *reinterpret_cast<LooseLanes*>(line + c) = weights;
      totals[0] += weights;
    }
    scale[r] = count ? 1.0f / sums(totals)[0] : 0.0f;
  }
  constexpr int N = R > 2 ? 1 : 4 / R;  // times 16 columns: eight sums again
  int64_t k = 0;
  for (; k + N * STRIDE <= width; k += N * STRIDE)
    gather<R, N>(values + k, value_step, slot, counts, scores, step, scale, out + k, width);
  for (; k < width; k += STRIDE)
    gather<R, 1>(values + k, value_step, slot, counts, scores, step, scale, out + k, width);
}

void pack(const float* from, float* to, int64_t count) { std::copy(from, from + count, to); }
void pack(const float* from, uint16_t* to, int64_t count) {
  for (int64_t i = 0; i < count; i += STRIDE)
    *reinterpret_cast<LooseBits*>(to + i) = rounded(load(from + i)) | rounded(load(from + i + STRIDE / 2)) << 16;
}

struct Span {  // what one query sees, if it is all from one slot on; count is -1 if it is not
  int64_t begin, count;
};

Span span_of(const bool* visible, int64_t step, int64_t slots) {
  if (step != 1) return {0, -1};
  const auto* const first = static_cast<const bool*>(std::memchr(visible, 1, slots));
  if (!first) return {0, 0};
  const int64_t begin = first - visible;
  const auto* const gap = static_cast<const bool*>(std::memchr(first, 0, slots - begin));
  if (!gap) return {begin, slots - begin};
  return {begin, std::memchr(gap, 1, visible + slots - gap) ? -1 : gap - first};
}

// Calls `f` with the size as a constant.
template <typename F>
void sized(int64_t size, const F& f) {
  if (size == 4) f(Several<4>{});
  else if (size == 3) f(Several<3>{});
  else if (size == 2) f(Several<2>{});
  else f(Several<1>{});
}

// Heads that share keys count as queries that see the same slots: member m of a row's shared head is its query m / sharing, in
// head m % sharing.
template <typename T>
void attend_all(const View& query, const View& key, const View& value, const View& mask, float scaling, T* to) {
  const int64_t heads = query.sizes[1], count = query.sizes[2], width = query.sizes[3], slots = key.sizes[2];
  const int64_t shared_heads = key.sizes[1], sharing = heads / shared_heads, members = count * sharing;
  const int64_t groups = (members + TOGETHER - 1) / TOGETHER, step = slots + 8;
  const T *q = query.as<T>(), *k = key.as<T>(), *v = value.as<T>();
  const auto visible = [&](int64_t b, int64_t i) {
    return mask.as<bool>() + (mask.sizes[0] > 1 ? b * mask.strides[0] : 0) + i * mask.strides[2];
  };
  std::vector<Span> spans;
  for (int64_t b = 0; b < mask.sizes[0]; b++)
    for (int64_t i = 0; i < count; i++) spans.push_back(span_of(visible(b, i), mask.strides[3], slots));
  const int64_t grain = std::max<int64_t>(1, (1 << 15) / (slots * width * std::min(members, TOGETHER)));
  shared(query.sizes[0] * shared_heads * groups, grain, [&](int64_t first, int64_t last) {
    thread_local std::vector<int32_t> listed;
    float* const scores = scratch(TOGETHER * (step + 2 * width));
    float *const from = scores + TOGETHER * step, *const out = from + TOGETHER * width;
    for (int64_t place = first; place < last; place++) {  // (row, shared head, group)
      const int64_t start = place % groups * TOGETHER, g = place / groups % shared_heads, b = place / groups / shared_heads;
      const int64_t end = std::min(start + TOGETHER, members);
      const Span* const span = &spans[mask.sizes[0] > 1 ? b * count : 0];
      const T* const keys = k + b * key.strides[0] + g * key.strides[1];
      const T* const values = v + b * value.strides[0] + g * value.strides[1];
      const auto run = [&](int64_t begin, int64_t size, const auto& slot, const int64_t* counts) {
        for (int64_t r = 0; r < size; r++) {
          const int64_t i = (begin + r) / sharing, h = g * sharing + (begin + r) % sharing;
          unpack(q + b * query.strides[0] + h * query.strides[1] + i * query.strides[2], from + r * width, width);
        }
        sized(size, [&](auto several) {
          attend<decltype(several)::value>(from, keys, key.strides[2], values, value.strides[2], slot, counts, width, scaling,
                                           scores, step, out);
        });
        for (int64_t r = 0; r < size; r++) {
          const int64_t i = (begin + r) / sharing, h = g * sharing + (begin + r) % sharing;
          pack(out + r * width, to + ((b * count + i) * heads + h) * width, width);
        }
      };
      for (int64_t m = start, next; m < end; m = next) {  // as many together as see the same slots, or begin with the same
        const int64_t i = m / sharing;
        const Span& own = span[i];
        int64_t counts[TOGETHER];
        for (next = m; next < end; next++) {
          const Span& other = span[next / sharing];
          if (next / sharing != i && (own.count < 0 || other.count < 0 || other.begin != own.begin)) break;
          counts[next - m] = other.count;
        }
        if (own.count >= 0) {
          run(m, next - m, Range{own.begin}, counts);
          continue;
        }
        const bool* const one = visible(b, i);
        listed.clear();
        for (int64_t s = 0; s < slots; s++)
          if (one[s * mask.strides[3]]) listed.push_back(s);
        std::fill(counts, counts + TOGETHER, static_cast<int64_t>(listed.size()));
        run(m, next - m, List{listed.data()}, counts);
      }
    }
  });
}

// query: (rows, heads, queries, width), key and value: (rows, fewer heads, slots, width), mask: (rows or 1, 1, queries, slots)
// bool -> (rows, queries, heads, width). width is a multiple of 16.
AtenTensorHandle decode_attention(AtenTensorHandle query, AtenTensorHandle key, AtenTensorHandle value, AtenTensorHandle mask,
                             double scaling) {
  const View q(query), k(key), v(value), m(mask);
  require(q.dims == 4 && k.dims == 4 && v.dims == 4 && m.dims == 4,
          "decode_attention: query, key, value and mask must have four dimensions.");
  require(q.floating(), "decode_attention: query must be float32 or bfloat16.");
  require(k.dtype == q.dtype && v.dtype == q.dtype, "decode_attention: key and value must have the dtype of query.");
  require(m.dtype == aoti_torch_dtype_bool(), "decode_attention: mask must be bool, true where a key is attended to.");
  require(std::equal(k.sizes, k.sizes + 4, v.sizes), "decode_attention: key and value must have the same shape.");
  require(k.sizes[0] == q.sizes[0], "decode_attention: query and key must have as many rows.");
  require(k.sizes[1] > 0 && q.sizes[1] % k.sizes[1] == 0,
          "decode_attention: the heads of query must be a multiple of those of key.");
  require(k.sizes[3] == q.sizes[3], "decode_attention: query and key must have one width.");
  require(q.sizes[3] > 0 && q.sizes[3] % STRIDE == 0, "decode_attention: the width must be a positive multiple of 16.");
  require(k.sizes[2] > 0, "decode_attention: there are no keys.");
  require((m.sizes[0] == 1 || m.sizes[0] == q.sizes[0]) && m.sizes[1] == 1 && m.sizes[2] == q.sizes[2] &&
              m.sizes[3] == k.sizes[2],
          "decode_attention: mask must be (rows or 1, 1, queries, keys).");
  if (q.strides[3] != 1) return decode_attention(torch::stable::contiguous(borrowed(query)).get(), key, value, mask, scaling);
  if (k.strides[3] != 1) return decode_attention(query, torch::stable::contiguous(borrowed(key)).get(), value, mask, scaling);
  if (v.strides[3] != 1) return decode_attention(query, key, torch::stable::contiguous(borrowed(value)).get(), mask, scaling);
  const int64_t shape[] = {q.sizes[0], q.sizes[2], q.sizes[1], q.sizes[3]};
  const AtenTensorHandle result = empty(shape, 4, q.dtype);
  const View to(result);
  if (to.count() == 0) return result;
  if (q.dtype == aoti_torch_dtype_float32()) attend_all(q, k, v, m, scaling, to.as<float>());
  else attend_all(q, k, v, m, scaling, to.as<uint16_t>());
  return result;
}

Tensor decode_attention_of(Tensor query, Tensor key, Tensor value, Tensor mask, double scaling) {
  return Tensor(decode_attention(query.get(), key.get(), value.get(), mask.get(), scaling));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dynamo_lm, library) {
  library.def("decode_attention(Tensor query, Tensor key, Tensor value, Tensor mask, float scaling) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(dynamo_lm, CPU, library) { library.impl("decode_attention", TORCH_BOX(&decode_attention_of)); }

extern "C" __attribute__((visibility("default"))) AOTITorchError dynamo_lm_decode_attention(
    AtenTensorHandle query, AtenTensorHandle key, AtenTensorHandle value, AtenTensorHandle mask, double scaling,
    AtenTensorHandle* result) {
  *result = decode_attention(query, key, value, mask, scaling);
  return AOTI_TORCH_SUCCESS;
}
