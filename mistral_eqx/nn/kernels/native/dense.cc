// Products of a weight of floats; compiled once for each instruction set.
#include "dense.h"

#include <algorithm>
#include <memory>

#include "lanes.h"

namespace {

// Bytes ahead of the ones in use, that are fetched from memory, where an output has more than so many.
constexpr int AHEAD = 2048, SHORT = 4 * AHEAD;

// So many sums fit in registers beside the rest.
constexpr int SUMS = LANES == 8 ? 8 : 16;

float number(const float* at) { return *at; }
float number(const BFloat16* at) {
  const uint32_t bits = uint32_t(at->bits) << 16;
  return load<float>(&bits);
}
float number(const Float16* at) {
  uint16_t bits[LANES] = {at->bits};
  const Floats numbers = from_float16(load<Halves>(bits));
  return numbers[0];
}

// `outputs` neighbours at a time, so that each load of activations serves all of them.
template <class T, int outputs, int rows>
void multiply(const Product& p, int64_t output) {
  const T* w = static_cast<const T*>(p.w) + output * p.inputs;
  const int64_t bytes = p.inputs * sizeof(T), ahead = bytes > SHORT ? AHEAD : outputs * bytes;
  Floats sums[outputs][rows] = {};
  int64_t k = 0;
  for (; k + LANES <= p.inputs; k += LANES) {
    Floats x[rows];
    for (int row = 0; row < rows; row++) x[row] = load<Floats>(p.x + row * p.inputs + k);
    for (int i = 0; i < outputs; i++) {
      if (k * int64_t(sizeof(T)) % 64 == 0) __builtin_prefetch(reinterpret_cast<const char*>(w + i * p.inputs + k) + ahead);
      const Floats numbers = Read<T>::at(w + i * p.inputs + k);
      for (int row = 0; row < rows; row++) sums[i][row] = fused(numbers, x[row], sums[i][row]);
    }
  }
  for (int i = 0; i < outputs; i++)
    for (int row = 0; row < rows; row++) {
      float sum = sum_of(sums[i][row]);
      for (int64_t rest = k; rest < p.inputs; rest++) sum += number(w + i * p.inputs + rest) * p.x[row * p.inputs + rest];
      p.y[row * p.outputs + output + i] = sum;
    }
}

template <class T, int rows>
void multiply_all(const Product& p, int64_t from, int64_t to) {
  constexpr int outputs = std::clamp(SUMS / rows, 1, 4);
  for (; from + outputs <= to; from += outputs) multiply<T, outputs, rows>(p, from);
  for (; from < to; from++) multiply<T, 1, rows>(p, from);
}

// ---- many rows: a lane for each, so that no sum goes across lanes ----

// The rows of a tile, and the outputs whose sums for a tile fit in registers beside the rest.
constexpr int VECTORS = 2, TILE = VECTORS * LANES, OUTPUTS = LANES == 8 ? 6 : 12;
// So many inputs at a time: their weights stay in the nearest cache for all tiles. Rows of weights do not share its sets.
constexpr int64_t STRETCH = 256, STRIDE = STRETCH + 16;

// Adds the products of weights w[output][input] and tile[input][row] to sums[output][row].
template <int vectors>
void add_products(const float* w, const float* tile, int64_t count, float* sums) {
  Floats total[OUTPUTS][vectors];
  for (int i = 0; i < OUTPUTS; i++)
    for (int v = 0; v < vectors; v++) total[i][v] = load<Floats>(sums + i * TILE + v * LANES);
  for (int64_t k = 0; k < count; k++) {
    Floats x[vectors];
    for (int v = 0; v < vectors; v++) x[v] = load<Floats>(tile + k * TILE + v * LANES);
#pragma GCC unroll 12
    for (int i = 0; i < OUTPUTS; i++) {
      const Floats weight = w[i * STRIDE + k] - Floats{};
      for (int v = 0; v < vectors; v++) total[i][v] = fused(weight, x[v], total[i][v]);
    }
  }
  for (int i = 0; i < OUTPUTS; i++)
    for (int v = 0; v < vectors; v++) std::memcpy(sums + i * TILE + v * LANES, &total[i][v], sizeof(Floats));
}

// Weights as float32.
template <class T>
void widen(const T* w, int64_t count, float* out) {
  int64_t k = 0;
  for (; k + LANES <= count; k += LANES) {
    const Floats numbers = Read<T>::at(w + k);
    std::memcpy(out + k, &numbers, sizeof numbers);
  }
  for (; k < count; k++) out[k] = number(w + k);
}

// Cache lines of a stretch of one output.
template <class T>
constexpr int64_t LINES = STRETCH * sizeof(T) / 64;

template <class T>
void multiply_many(const Product& p, int64_t from, int64_t to) {
  const int64_t tiles = (p.rows + TILE - 1) / TILE, groups = (to - from + OUTPUTS - 1) / OUTPUTS, size = OUTPUTS * TILE;
  const std::unique_ptr<float[]> sums(new float[groups * tiles * size]());
  alignas(64) float w[OUTPUTS * STRIDE] = {};
  // A step is a stretch of one group of outputs. The tiles of a stretch are used by all groups before those of the next.
  const auto weights = [&](int64_t step, int64_t i) {
    const int64_t output = std::min(from + step % groups * OUTPUTS + i, to - 1);
    return static_cast<const T*>(p.w) + output * p.inputs + step / groups * STRETCH;
  };
  for (int64_t step = 0; step / groups * STRETCH < p.inputs; step++) {
    const int64_t k = step / groups * STRETCH, count = std::min(STRETCH, p.inputs - k);
    for (int i = 0; i < OUTPUTS; i++) widen(weights(step, i), count, w + i * STRIDE);
    for (int64_t tile = 0; tile < tiles; tile++) {
      const float* x = p.tiles + (tile * p.inputs + k) * TILE;
      // What the next step reads is fetched from memory meanwhile, a part for each tile.
      for (int64_t line = tile; line < OUTPUTS * LINES<T>; line += tiles)
        __builtin_prefetch(weights(step + 1, line / LINES<T>) + line % LINES<T> * (64 / sizeof(T)));
      float* own = sums.get() + (step % groups * tiles + tile) * size;
      if (p.rows - tile * TILE > LANES) add_products<VECTORS>(w, x, count, own);
      else add_products<1>(w, x, count, own);
    }
  }
  for (int64_t group = 0; group < groups; group++) {
    const int64_t first = from + group * OUTPUTS, outputs = std::min<int64_t>(OUTPUTS, to - first);
    for (int64_t row = 0; row < p.rows; row++) {
      const float* own = sums.get() + (group * tiles + row / TILE) * size + row % TILE;
      for (int64_t i = 0; i < outputs; i++) p.y[row * p.outputs + first + i] = own[i * TILE];
    }
  }
}

void arrange(const Product& p, int64_t tile) {
  // A cache line of each row at a time.
  constexpr int64_t LINE = 16;
  const int64_t from = tile * TILE, rows = std::min<int64_t>(TILE, p.rows - from);
  float* out = p.tiles + from * p.inputs;
  for (int64_t k = 0; k < p.inputs; k += LINE)
    for (int64_t row = 0; row < TILE; row++)
      for (int64_t i = k; i < std::min(k + LINE, p.inputs); i++)
        out[i * TILE + row] = row < rows ? p.x[(from + row) * p.inputs + i] : 0;
}

template <class T>
void multiply_rows(const Product& p, int64_t from, int64_t to) {
  if (p.tiles) return multiply_many<T>(p, from, to);
  switch (p.rows) {
    case 1: return multiply_all<T, 1>(p, from, to);
    case 2: return multiply_all<T, 2>(p, from, to);
    case 3: return multiply_all<T, 3>(p, from, to);
    case 4: return multiply_all<T, 4>(p, from, to);
    case 5: return multiply_all<T, 5>(p, from, to);
    case 6: return multiply_all<T, 6>(p, from, to);
    case 7: return multiply_all<T, 7>(p, from, to);
    default: return multiply_all<T, FEW_ROWS>(p, from, to);
  }
}

}  // namespace

namespace SET {
const Multiplying multiplying = {
    multiply_rows<float>, multiply_rows<BFloat16>, multiply_rows<Float16>, TILE, OUTPUTS, arrange};
}
