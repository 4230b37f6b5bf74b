// Decoder layers of Llama's form for the few tokens of a decoding step, one after another in one call.
//
// norm, queries, keys and values, rotary positions, the write to the cache, attention, output, norm, gated unit: called one by
// one, these are two dozen operations of some microseconds each around products that take as long. The products and attention are
// those of the other files, and what lies between is done row by row, so a token's result does not depend on what is beside it.
// Values are rounded to the type of the layer where transformers' own code rounds them, but for rotary positions and the gate.

namespace {

constexpr int LAYER = 1;  // use of `scratch`: what a layer computes on the way

enum Kind : int64_t { FLOAT32, BFLOAT16, INT8, INT4 };

struct Matrix {  // a weight (out, in), as `kind` says; scale is null where that is a float, bias where there is none
  const void* weight;
  const uint16_t* scale;
  const void* bias;
  int64_t out, in, kind;
};

struct Layer {
  Matrix query, key, value, output, gate, up, down;
  const void *input_norm, *post_norm, *query_norm, *key_norm;  // query_norm and key_norm: of single heads, or null
  const void* embedding_norm;  // null, or attention reads (embedding, state), each with its norm, see `Step`
  int64_t size, heads, kv_heads, width, dtype;  // width: of a head
  double eps, scaling;
};

struct Step {
  const void *hidden, *embedding;  // (slots, tokens, size); embedding: null, or what stands beside the state
  const void *cosine, *sine;       // (slots or 1, tokens, width)
  int64_t turn_step;               // from one slot's turns to the next one's, 0 where they are the same
  const bool* mask;                // (slots or 1, 1, tokens, end)
  int64_t mask_rows, mask_step, mask_line;
  const int64_t* starts;           // (slots,): where in the cache each slot's tokens go
  int64_t slots, tokens, end;
  void* result;                    // (slots, tokens, size)
};

struct Entry {          // of a cache, for one layer
  void *keys, *values;  // (slots, kv_heads, room, width), width contiguous
  int64_t slot_step, head_step, place_step;
};

// float32 as it would be read from a T.
template <typename T>
inline Lanes as(Lanes values) {
  if constexpr (std::is_same_v<T, float>) return values;
  else return (Lanes)(rounded(values) << 16);
}

inline float total(Lanes values) {
  float sum = 0;
  for (int i = 0; i < 8; i++) sum += values[i];
  return sum;
}

// Rows of x, (rows, size), divided by their root mean square and times weight -> y, whose rows are `step` apart.
template <typename T>
void norm_rows(const T* x, const void* weight, double eps, int64_t rows, int64_t size, T* y, int64_t step) {
  const T* const factor = static_cast<const T*>(weight);
  for (int64_t r = 0; r < rows; r++, x += size, y += step) {
    Lanes squares = {};
    for (int64_t i = 0; i < size; i += 8) squares = fused(wide(x + i), wide(x + i), squares);
    const float scale = 1.0f / std::sqrt(total(squares) / size + static_cast<float>(eps));
    for (int64_t i = 0; i < size; i += 8) put(as<T>(wide(x + i) * scale) * wide(factor + i), y + i);
  }
}

// One head's entries at one position, turned by it: pairs are (i, i + width / 2). from and to may be the same.
template <typename T>
inline void turn(const T* from, const T* cosine, const T* sine, int64_t width, T* to) {
  const int64_t half = width / 2;
  for (int64_t i = 0; i < half; i += 8) {
    const Lanes low = wide(from + i), high = wide(from + half + i);
    put(low * wide(cosine + i) - high * wide(sine + i), to + i);
    put(high * wide(cosine + half + i) + low * wide(sine + half + i), to + half + i);
  }
}

// gate * sigmoid(gate) * up -> gate.
template <typename T>
void gated(T* gate, const T* up, int64_t count) {
  for (int64_t i = 0; i < count; i += 8) {
    const Lanes x = wide(gate + i);
    const Lanes e = exponential((Lanes)((Bits)x | 0x80000000u));  // of -|x|
    const Lanes sigmoid = (x < 0.0f ? e : Lanes{} + 1.0f) / (e + 1.0f);
    put(as<T>(x * sigmoid) * wide(up + i), gate + i);
  }
}

// a + b -> b.
template <typename T>
void add(const T* a, T* b, int64_t count) {
  for (int64_t i = 0; i < count; i += 8) put(wide(a + i) + wide(b + i), b + i);
}

// Weights of one kind and inner size that are multiplied with the same rows, and that threads share out as one.
struct Together {
  const Matrix* matrices[3];
  int count;

  int64_t size() const { return matrices[0]->kind == INT8 || matrices[0]->kind == INT4 ? BESIDE : BLOCK; }
  int64_t blocks_of(int i) const { return (matrices[i]->out + size() - 1) / size(); }
  int64_t blocks() const {
    int64_t sum = 0;
    for (int i = 0; i < count; i++) sum += blocks_of(i);
    return sum;
  }
};

// A block of a rounded weight, as what comes next.
inline Next at(const Matrix& m, int64_t block) {
  const int64_t bytes = block_bytes(m.in / GROUP, m.kind == INT4 ? 4 : 8);
  return {static_cast<const uint8_t*>(m.weight) + block * bytes, bytes};
}

// Where the thread that has blocks from `first` on, of `count` in other products, begins in these; rounded weights alone.
inline Next beginning(const Together& products, int64_t first, int64_t count) {
  int64_t block = first * products.blocks() / count;
  int i = 0;
  while (block >= products.blocks_of(i)) block -= products.blocks_of(i++);
  return at(*products.matrices[i], block);
}

// Products of x, (rows, in), with some weights -> y[i]: (rows, out of i); those with `following` come after them.
template <typename T>
void products(const T* x, const Together& weights, T* const (&y)[3], int64_t rows, const Together& following) {
  const int64_t in = weights.matrices[0]->in, kind = weights.matrices[0]->kind, size = weights.size(), blocks = weights.blocks();
  const bool whole = size == BESIDE;
  Rounded entries = {};
  const float* floats = nullptr;
  if (whole) entries = rounded_groups(x, rows * in / GROUP);
  else floats = unpacked(x, rows * in);
  shared(blocks, std::max<int64_t>(1, WORK / (in * size)), [&](int64_t first, int64_t last) {
    const Next after = whole ? beginning(following, first, blocks) : Next{};
    for (int i = 0; i < weights.count; i++) {
      const Matrix& m = *weights.matrices[i];
      const int64_t count = weights.blocks_of(i), begin = std::max<int64_t>(0, first), end = std::min(count, last);
      const T* const bias = static_cast<const T*>(m.bias);
      const Next next = !whole || last <= count ? after : at(*weights.matrices[i + 1], 0);
      if (begin < end && kind == INT8)
        blocks_of<8>(static_cast<const uint8_t*>(m.weight), m.scale, entries, bias, y[i], rows, in / GROUP, m.out, begin, end, next);
      else if (begin < end && kind == INT4)
        blocks_of<4>(static_cast<const uint8_t*>(m.weight), m.scale, entries, bias, y[i], rows, in / GROUP, m.out, begin, end, next);
      else if (begin < end)
        columns(static_cast<const T*>(m.weight), floats, bias, y[i], rows, in, m.out, begin * size, std::min(m.out, end * size));
      first -= count, last -= count;
    }
  });
}

// Queries turned in place, keys turned into the cache, values copied into it.
template <typename T>
void place(const Layer& layer, const Step& step, const Entry& entry, T* queries, T* keys, const T* values) {
  const int64_t width = layer.width, rows = step.slots * step.tokens;
  if (layer.query_norm) norm_rows(queries, layer.query_norm, layer.eps, rows * layer.heads, width, queries, width);
  if (layer.key_norm) norm_rows(keys, layer.key_norm, layer.eps, rows * layer.kv_heads, width, keys, width);
  for (int64_t slot = 0; slot < step.slots; slot++)
    for (int64_t t = 0; t < step.tokens; t++) {
      const int64_t row = slot * step.tokens + t;
      const T* const cosine = static_cast<const T*>(step.cosine) + slot * step.turn_step + t * width;
      const T* const sine = static_cast<const T*>(step.sine) + slot * step.turn_step + t * width;
      for (int64_t h = 0; h < layer.heads; h++) {
        T* const query = queries + (row * layer.heads + h) * width;
        turn(query, cosine, sine, width, query);
      }
      for (int64_t h = 0; h < layer.kv_heads; h++) {
        const int64_t at = slot * entry.slot_step + h * entry.head_step + (step.starts[slot] + t) * entry.place_step;
        turn(keys + (row * layer.kv_heads + h) * width, cosine, sine, width, static_cast<T*>(entry.keys) + at);
        const T* const value = values + (row * layer.kv_heads + h) * width;
        std::copy(value, value + width, static_cast<T*>(entry.values) + at);
      }
    }
}

template <typename T>
void attention_of(const Layer& layer, const Step& step, const Entry& entry, T* queries, T* to) {
  const int32_t dtype = std::is_same_v<T, float> ? aoti_torch_dtype_float32() : aoti_torch_dtype_bfloat16();
  const int64_t width = layer.width, line = layer.heads * width;
  int64_t query_sizes[] = {step.slots, layer.heads, step.tokens, width}, query_strides[] = {step.tokens * line, width, line, 1};
  int64_t key_sizes[] = {step.slots, layer.kv_heads, step.end, width};
  int64_t key_strides[] = {entry.slot_step, entry.head_step, entry.place_step, 1};
  int64_t mask_sizes[] = {step.mask_rows, 1, step.tokens, step.end}, mask_strides[] = {step.mask_step, 0, step.mask_line, 1};
  attend_all(View(queries, 4, query_sizes, query_strides, dtype), View(entry.keys, 4, key_sizes, key_strides, dtype),
             View(entry.values, 4, key_sizes, key_strides, dtype),
             View(const_cast<bool*>(step.mask), 4, mask_sizes, mask_strides, aoti_torch_dtype_bool()),
             static_cast<float>(layer.scaling), to);
}

// state: (slots, tokens, size), the layer's input and in the end its output; `next` comes after it.
template <typename T>
void run_layer(const Layer& layer, const Step& step, const Entry& entry, const Layer& next, T* state) {
  const int64_t rows = step.slots * step.tokens, size = layer.size, wide_size = layer.gate.out;
  const int64_t query = layer.query.out, key = layer.key.out;
  const T* const embedding = static_cast<const T*>(step.embedding);
  T* const normed = reinterpret_cast<T*>(scratch<LAYER>(rows * (2 * size + 2 * query + 2 * key + 2 * wide_size)));
  T *const queries = normed + rows * 2 * size, *const keys = queries + rows * query, *const values = keys + rows * key;
  T *const mixed = values + rows * key, *const gate = mixed + rows * query, *const up = gate + rows * wide_size;
  const int64_t in = layer.query.in;
  const Together reading = {{&layer.query, &layer.key, &layer.value}, 3}, output = {{&layer.output}, 1};
  const Together gating = {{&layer.gate, &layer.up}, 2}, down = {{&layer.down}, 1};
  const Together following = {{&next.query, &next.key, &next.value}, 3};
  if (embedding) norm_rows(embedding, layer.embedding_norm, layer.eps, rows, size, normed, in);
  norm_rows(state, layer.input_norm, layer.eps, rows, size, normed + (in - size), in);
  products(normed, reading, {queries, keys, values}, rows, output);
  place(layer, step, entry, queries, keys, values);
  attention_of(layer, step, entry, queries, mixed);
  products(mixed, output, {normed}, rows, gating);
  add(normed, state, rows * size);
  norm_rows(state, layer.post_norm, layer.eps, rows, size, normed, size);
  products(normed, gating, {gate, up}, rows, down);
  gated(gate, up, rows * wide_size);
  products(gate, down, {normed}, rows, following);
  add(normed, state, rows * size);
}

template <typename T>
void run_layers(const Layer* const* layers, const Entry* entries, int64_t count, const Step& step) {
  const T* const hidden = static_cast<const T*>(step.hidden);
  T* const state = static_cast<T*>(step.result);
  std::copy(hidden, hidden + step.slots * step.tokens * layers[0]->size, state);
  for (int64_t i = 0; i < count; i++) run_layer(*layers[i], step, entries[i], *layers[(i + 1) % count], state);
}

}  // namespace

// All layers have one type and size; entries[i] is where layer i writes its keys and values.
extern "C" __attribute__((visibility("default"))) void dynamo_lm_decoder_layers(
    const Layer* const* layers, const Entry* entries, int64_t count, const Step* step) {
  if (layers[0]->dtype == FLOAT32) run_layers<float>(layers, entries, count, *step);
  else run_layers<uint16_t>(layers, entries, count, *step);
}
