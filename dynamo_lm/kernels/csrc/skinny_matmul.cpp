// x @ weight^T for the few rows of a decoding step, float32 or bfloat16, on any CPU that has a C++ compiler.
//
// A library's product of 2 to 4 rows takes 1.5 to 3.4 times what it takes with one row, although the weight is read once
// in both, and one in bfloat16 takes that much again where the CPU has no units for it. Here every entry of the weight is
// loaded (and converted) once and multiplied with all rows while it is in a register; memory decides, not arithmetic.

namespace {

constexpr int64_t BLOCK = 8;          // rows of the weight that are finished together, and that threads share out
constexpr int64_t WORK = 1 << 16;     // entries of the weight below which a second thread does not pay
constexpr int64_t STREAMS = 8;        // places of the weight that are fetched in turn
constexpr int64_t STREAM = 1 << 13;    // bytes of each, or one row where that is more

// R rows of x against O rows of the weight: one vector of sums each, R * O <= 9, so that all of them stay in registers.
//
// Meanwhile as many entries of the weight are fetched from `ahead`, in STREAMS that are `apart`: hardware runs further ahead in
// each of them, into the second cache, than the first cache could by itself with the few lines that it can wait for at a time.
// `done` entries of this group come before these: what is fetched goes on where the tile before them left off.
template <int R, int O, typename T>
inline __attribute__((always_inline)) void tile(
    const T* weight, const float* x, Lanes* totals, int64_t in, const T* ahead, int64_t apart, int64_t done) {
  constexpr uint64_t LINE = 64 / sizeof(T), LINES = (O * STRIDE + LINE - 1) / LINE;  // entries of one; lines in a stride
  Lanes total[R][O] = {};
  for (int64_t k = 0; k < in; k += STRIDE) {
    const uint64_t line = static_cast<uint64_t>(done + k * O) / LINE;
    const T* const place = ahead + line % STREAMS * apart + line / STREAMS * LINE;
    for (uint64_t p = 0; p < LINES; p++) __builtin_prefetch(place + p * apart);
    if constexpr (R < O) {  // what is fewer waits in registers for the other
      Lanes first[R], last[R];
      for (int r = 0; r < R; r++) first[r] = held(load(x + r * in + k));
      for (int r = 0; r < R; r++) last[r] = held(load(x + r * in + k + STRIDE / 2));
      for (int o = 0; o < O; o++) {
        const Lanes v = held(one(weight + o * in + k)), w = held(two(weight + o * in + k));
        for (int r = 0; r < R; r++) total[r][o] = fused(w, last[r], fused(v, first[r], total[r][o]));
      }
    } else {
      Lanes w[O];
      for (int o = 0; o < O; o++) w[o] = held(one(weight + o * in + k));
      for (int r = 0; r < R; r++) {
        const Lanes first = held(load(x + r * in + k));
        for (int o = 0; o < O; o++) total[r][o] = fused(w[o], first, total[r][o]);
      }
      for (int o = 0; o < O; o++) w[o] = held(two(weight + o * in + k));
      for (int r = 0; r < R; r++) {
        const Lanes last = held(load(x + r * in + k + STRIDE / 2));
        for (int o = 0; o < O; o++) total[r][o] = fused(w[o], last, total[r][o]);
      }
    }
  }
  for (int r = 0; r < R; r++)
    for (int o = 0; o < O; o++) totals[r * BLOCK + o] = total[r][o];
}

template <int R, int O, typename T>
inline __attribute__((always_inline)) void tiles(
    const T* weight, const float* x, Lanes* totals, int64_t in, int64_t count, const T* ahead, int64_t apart, int64_t done) {
  int64_t o = 0;
  for (; o + O <= count; o += O) tile<R, O>(weight + o * in, x, totals + o, in, ahead, apart, done + o * in);
  if constexpr (O > 1)
    if (o < count)
      tiles<R, (O + 1) / 2>(weight + o * in, x, totals + o, in, count - o, ahead, apart, done + o * in);
}

// R rows of x against up to BLOCK rows of the weight, whose sums are then added up, rounded and written as whole vectors.
template <int R, int O, typename T>
void block(const T* weight, const float* x, const T* bias, T* y, int64_t in, int64_t out, int64_t count, const T* ahead,
           int64_t apart, int64_t done) {
  Lanes totals[R * BLOCK];
  if (count == BLOCK) {
    tiles<R, O>(weight, x, totals, in, BLOCK, ahead, apart, done);
    const Lanes more = bias ? wide(bias) : Lanes{};
    for (int r = 0; r < R; r++) put(sums(totals + r * BLOCK) + more, y + r * out);
  } else {
    std::fill(totals, totals + R * BLOCK, Lanes{});
    tiles<R, 1>(weight, x, totals, in, count, ahead, apart, done);
    T part[BLOCK] = {};
    if (bias) std::copy(bias, bias + count, part);
    const Lanes more = wide(part);
    for (int r = 0; r < R; r++) {
      put(sums(totals + r * BLOCK) + more, part);
      std::copy(part, part + count, y + r * out);
    }
  }
}

template <int R, int O, typename T>
void blocks(const T* weight, const float* x, const T* bias, T* y, int64_t in, int64_t out, int64_t count, const T* ahead,
            int64_t apart) {
  for (int64_t o = 0; o < count; o += BLOCK)
    block<R, O>(weight + o * in, x, bias ? bias + o : nullptr, y + o, in, out, std::min(BLOCK, count - o),
                ahead, apart, o * in);
}

// Columns [begin, end) of y = x @ weight^T + bias; x: (rows, in) in the order of `unpack`, y: (rows, out).
template <typename T>
void columns(const T* weight, const float* x, const T* bias, T* y, int64_t rows, int64_t in, int64_t out, int64_t begin,
             int64_t end) {
  const int64_t stream = std::max<int64_t>(1, STREAM / (in * static_cast<int64_t>(sizeof(T))));  // in rows of the weight
  const int64_t group = STREAMS * stream, apart = stream * in;  // a group stays in the caches while all rows of x pass
  constexpr bool ALIKE = sizeof(T) == sizeof(float);  // nothing to convert: few sums at a time, for memory to keep up
  for (int64_t o = begin; o < end; o += group) {
    const int64_t count = std::min(group, end - o);
    const T *w = weight + o * in, *next = w + group * in, *b = bias ? bias + o : nullptr;
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) blocks<4, 2>(w, x + r * in, b, y + r * out + o, in, out, count, next, apart);
    if (rows - r == 3) blocks<3, ALIKE ? 2 : 3>(w, x + r * in, b, y + r * out + o, in, out, count, next, apart);
    if (rows - r == 2) blocks<2, ALIKE ? 2 : 4>(w, x + r * in, b, y + r * out + o, in, out, count, next, apart);
    if (rows - r == 1) blocks<1, 4>(w, x + r * in, b, y + r * out + o, in, out, count, next, apart);
  }
}

// Shares the columns of a product among threads, in whole blocks.
template <typename F>
void in_blocks(int64_t in, int64_t out, const F& part) {
  const int64_t grain = std::max<int64_t>(1, WORK / (in * BLOCK));
  shared((out + BLOCK - 1) / BLOCK, grain, [&](int64_t first, int64_t last) { part(first * BLOCK, std::min(out, last * BLOCK)); });
}

// Rows of x in the order of `unpack`, in the thread's scratch unless they are float32.
template <typename T>
const float* unpacked(const T* x, int64_t count) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {
    float* const to = scratch(count);
    unpack(x, to, count);
    return to;
  }
}

// x: (rows, in), weight: (out, in), bias: (out,) or null -> y: (rows, out).
template <typename T>
void multiply(const T* x, const T* weight, const T* bias, T* y, int64_t rows, int64_t in, int64_t out) {
  const float* const from = unpacked(x, rows * in);
  in_blocks(in, out, [&](int64_t begin, int64_t end) { columns(weight, from, bias, y, rows, in, out, begin, end); });
}

// x: (..., in), weight: (out, in) contiguous of the same type, bias: (out,) or null -> (..., out). in is a multiple of 16.
AtenTensorHandle skinny_matmul(AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle bias) {
  const View from(x), w(weight);
  require(from.dims >= 1 && from.dims <= MOST_DIMS, "skinny_matmul: x has no dimension, or more than 8.");
  require(w.dims == 2, "skinny_matmul: weight must have two dimensions, (out, in).");
  require(from.floating(), "skinny_matmul: x must be float32 or bfloat16.");
  require(w.dtype == from.dtype, "skinny_matmul: weight must have the dtype of x.");
  require(w.contiguous(), "skinny_matmul: weight must be contiguous; pass weight.contiguous().");
  const int64_t out = w.sizes[0], in = w.sizes[1];
  require(from.sizes[from.dims - 1] == in, "skinny_matmul: the last size of x must be the last size of weight.");
  require(in > 0 && in % STRIDE == 0, "skinny_matmul: the inner size must be a positive multiple of 16.");
  if (bias) {
    const View b(bias);
    require(b.dims == 1 && b.sizes[0] == out, "skinny_matmul: bias must have one dimension, the first size of weight.");
    require(b.dtype == from.dtype && b.contiguous(), "skinny_matmul: bias must be contiguous and have the dtype of x.");
  }
  if (!from.contiguous()) return skinny_matmul(torch::stable::contiguous(borrowed(x)).get(), weight, bias);
  const int64_t rows = from.count() / in;
  const AtenTensorHandle result = empty_product(from, out);
  const View to(result);
  const void* const b = bias ? View(bias).data : nullptr;
  if (from.dtype == aoti_torch_dtype_float32())
    multiply<float>(from.as<float>(), w.as<float>(), static_cast<const float*>(b), to.as<float>(), rows, in, out);
  else
    multiply<uint16_t>(from.as<uint16_t>(), w.as<uint16_t>(), static_cast<const uint16_t*>(b), to.as<uint16_t>(), rows, in, out);
  return result;
}

Tensor skinny_matmul_of(Tensor x, Tensor weight, std::optional<Tensor> bias) {
  return Tensor(skinny_matmul(x.get(), weight.get(), bias ? bias->get() : nullptr));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dynamo_lm, library) { library.def("skinny_matmul(Tensor x, Tensor weight, Tensor? bias) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(dynamo_lm, CPU, library) { library.impl("skinny_matmul", TORCH_BOX(&skinny_matmul_of)); }

// What compiled steps call without a way through Python. A refusal is thrown through their C++, so that its sentence is kept.
extern "C" __attribute__((visibility("default"))) AOTITorchError dynamo_lm_skinny_matmul(
    AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* bias, AtenTensorHandle* result) {
  *result = skinny_matmul(x, weight, bias ? *bias : nullptr);
  return AOTI_TORCH_SUCCESS;
}
