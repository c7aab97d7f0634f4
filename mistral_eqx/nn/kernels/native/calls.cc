// What XLA calls: checks sizes, divides the work among threads, chooses the instructions.
#include <algorithm>
#include <atomic>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <string_view>
#include <thread>
#include <vector>

#include "attend.h"
#include "dense.h"
#include "panels.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

struct Set {
  const Instructions* instructions = nullptr;
  const Attending* attending = nullptr;
  const Multiplying* multiplying = nullptr;
};

const Set& chosen() {
  static const Set found = []() -> Set {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw"))
      return {&avx512::instructions, &avx512::attending, &avx512::multiplying};
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
      return {&avx2::instructions, &avx2::attending, &avx2::multiplying};
    return {};
#elif defined(__aarch64__)
    return {&neon::instructions, &neon::attending, &neon::multiplying};
#else
    return {};
#endif
  }();
  return found;
}

// A format by its name: "NF4/64" is the one that the table calls "NF4/", in blocks of 64.
std::optional<Format> found(const Instructions& set, std::string_view name) {
  const std::string_view kind = name.substr(0, name.find('/') + 1), size = name.substr(kind.size());
  if (kind.empty()) {
    for (int i = 0; i < set.count; i++)
      if (name == set.formats[i].name) return set.formats[i];
    return {};
  }
  int numbers = 0;
  const auto [end, error] = std::from_chars(size.data(), size.data() + size.size(), numbers);
  const bool whole = error == std::errc() && end == size.data() + size.size();
  if (!whole || numbers <= 0 || numbers > LARGEST_BLOCK) return {};
  for (int i = 0; i < set.count; i++)
    if (kind == set.formats[i].name && numbers % set.formats[i].step() == 0) return set.formats[i].of_size(numbers);
  return {};
}

// Runs f(0) to f(count - 1) on this thread and those of XLA, in any order. Parts are claimed, so a thread that comes
// late delays nobody, and the shared counters outlive the call.
template <class F>
void in_parallel(ffi::ThreadPool& pool, int64_t count, const F& f) {
  struct Shared {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto shared = std::make_shared<Shared>();
  const F* work = &f;
  auto run = [shared, work, count] {
    for (int64_t i; (i = shared->next.fetch_add(1)) < count;) {
      (*work)(i);
      shared->done.fetch_add(1, std::memory_order_acq_rel);
    }
  };
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), count) - 1;
  for (int64_t i = 0; i < helpers; i++) pool.Schedule(decltype(run)(run));
  run();
  for (int spins = 0; shared->done.load(std::memory_order_acquire) != count; spins++)
    if (spins > 20000) std::this_thread::yield();
}

// Below this many bytes of weights, one thread is done before a second one has begun.
constexpr int64_t SMALL = 48 * 1024;
// From so many rows on, it is faster to dequantize weights once than to read their codes for each few rows.
constexpr int64_t MANY = 16;

// One weight of a call, or one for each group of rows, and its results.
struct Weight {
  Format format;
  const uint8_t* panels;
  float* y;
  int64_t count, bytes;                // How many panels, and bytes of each.
  int64_t part = 0, first_of_all = 0;  // How many panels make a part, and the number of its first part.

  int64_t parts() const { return (count + part - 1) / part; }
};

// The products of all rows of x, shape (rows, inputs), with each weight.
void multiply(ffi::ThreadPool& pool, const Instructions& set, const float* x, int64_t rows, int64_t inputs,
              std::vector<Weight>& weights) {
  if (rows == 0) return;
  int64_t parts = 0;
  const bool many = rows >= MANY;
  bool any_codes = false, any_numbers = false;
  for (Weight& weight : weights) {
    // Parts of 128 KB, and not fewer than eight, so that threads end together.
    weight.part = std::max<int64_t>(1, std::min(weight.count / 8, (128 * 1024) / weight.bytes));
    // Of many rows, panels are multiplied in pairs.
    if (many) weight.part += weight.part % 2;
    if (weight.count * weight.bytes * rows < SMALL) weight.part = weight.count;
    weight.first_of_all = parts;
    parts += weight.parts();
    (weight.format.exact ? any_numbers : any_codes) = true;
  }
  if (many && !set.pair_tile) any_numbers = true, any_codes = false;
  Activations activations{};
  activations.numbers = x, activations.rows = rows, activations.inputs = inputs;
  std::unique_ptr<int8_t[]> codes;
  std::unique_ptr<int32_t[]> pairs;
  std::unique_ptr<float[]> scales, tiles, pair_scales;
  if (any_codes) {
    codes.reset(new int8_t[rows * inputs * 2]), scales.reset(new float[rows * (inputs / 32) * 3]);
    activations.codes = codes.get(), activations.scales = scales.get();
    activations.sums = scales.get() + rows * (inputs / 32);
    if (!many)
      for (int64_t row = 0; row < rows; row++) set.quantize(activations, row);
    else {
      const int64_t count = (rows + set.pair_tile - 1) / set.pair_tile, all = count * set.pair_tile;
      pairs.reset(new int32_t[all * inputs / 2]), pair_scales.reset(new float[all * (inputs / 32) * 3]);
      activations.pairs = pairs.get(), activations.pair_scales = pair_scales.get();
      activations.pair_sums = pair_scales.get() + all * (inputs / 32);
      in_parallel(pool, count, [&](int64_t tile) {
        for (int64_t row = tile * set.pair_tile; row < std::min(rows, (tile + 1) * set.pair_tile); row++)
          set.quantize(activations, row);
        set.arrange_pairs(activations, tile);
      });
    }
  }
  if (many && any_numbers) {
    const int64_t count = (rows + set.tile - 1) / set.tile;
    tiles.reset(new float[count * set.tile * inputs]);
    activations.tiles = tiles.get();
    in_parallel(pool, count, [&](int64_t tile) { set.arrange(activations, tile); });
  }
  in_parallel(pool, parts, [&](int64_t part) {
    auto weight = weights.end();
    while ((--weight)->first_of_all > part) {
    }
    const int64_t begin = (part - weight->first_of_all) * weight->part;
    const int64_t end = std::min(weight->count, begin + weight->part), stride = 16 * weight->count;
    const Format& format = weight->format;
    const uint8_t* panels = weight->panels + begin * weight->bytes;
    float* y = weight->y + 16 * begin;
    if (many) return format.product_of_many(format, panels, weight->bytes, end - begin, activations, y, stride);
    for (int64_t at = 0; at < end - begin; at++)
      format.product(format, panels + at * weight->bytes, activations, 0, rows, y + 16 * at, stride);
  });
}

// The weights of a call; panels have a leading axis of so many groups, or none for -1.
ffi::Error read(const Instructions& set, const ffi::Buffer<ffi::F32>& x, int64_t groups, const ffi::RemainingArgs& panels,
                const ffi::RemainingRets& ys, std::string_view formats, std::vector<Weight>& weights) {
  const auto xs = x.dimensions();
  if (xs.size() != 2 || panels.size() != ys.size())
    return ffi::Error::InvalidArgument("x must have 2 dimensions, and each weight one result.");
  const int64_t rows = xs[0], inputs = xs[1];
  for (size_t i = 0; i < panels.size(); i++) {
    const auto blocks = panels.get<ffi::Buffer<ffi::U8>>(i);
    auto result = ys.get<ffi::Buffer<ffi::F32>>(i);
    if (!blocks || !result) return ffi::Error::InvalidArgument("Panels must be bytes, and results float32.");
    const auto name = formats.substr(0, formats.find(' '));
    formats.remove_prefix(std::min(formats.size(), name.size() + 1));
    const auto format = found(set, name);
    if (!format) return ffi::Error::InvalidArgument("The kernels have no such format.");
    const auto all = blocks->dimensions(), rs = (*result)->dimensions();
    const bool grouped = groups >= 0;
    if (all.size() != 3 + size_t(grouped) || (grouped && all[0] != groups))
      return ffi::Error::InvalidArgument("The shapes of x, panels and y do not fit each other.");
    const auto ws = all.last(3);
    if (rs.size() != 2 || ws[2] != 16 * int64_t(format->bytes) || ws[1] > INT64_MAX / format->size ||
        ws[1] * format->size != inputs || rs[0] != rows || ws[0] > INT64_MAX / 16 || rs[1] != 16 * ws[0] ||
        (!format->exact && inputs % 32))
      return ffi::Error::InvalidArgument("The shapes of x, panels and y do not fit each other.");
    if (rows == 0 || ws[0] == 0 || ws[1] == 0) continue;
    weights.push_back({*format, blocks->typed_data(), (*result)->typed_data(), ws[0], ws[1] * ws[2]});
  }
  return ffi::Error::Success();
}

const ffi::Error& no_instructions() {
  static const ffi::Error error(ffi::ErrorCode::kUnimplemented, "This processor has none of the kernels' instructions.");
  return error;
}

ffi::Error linear(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::RemainingArgs panels, ffi::RemainingRets ys,
                  std::string_view formats) {
  const Instructions* set = chosen().instructions;
  if (!set) return no_instructions();
  std::vector<Weight> weights;
  if (auto error = read(*set, x, -1, panels, ys, formats, weights); error.failure()) return error;
  if (!weights.empty()) multiply(pool, *set, x.typed_data(), x.dimensions()[0], x.dimensions()[1], weights);
  return ffi::Error::Success();
}

using Sizes = ffi::BufferR1<ffi::S32>;

// Whether groups of these sizes have no more than so many rows.
bool fit(const Sizes& sizes, int64_t rows) {
  int64_t total = 0;
  const int32_t* size = sizes.typed_data();
  for (size_t group = 0; group < sizes.element_count(); group++) {
    if (size[group] < 0) return false;
    total += size[group];
  }
  return total <= rows;
}

// Each group's rows times its own weights, which begin where those of the group before it end.
ffi::Error grouped_linear(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, Sizes sizes, ffi::RemainingArgs panels,
                          ffi::RemainingRets ys, std::string_view formats) {
  const Instructions* set = chosen().instructions;
  if (!set) return no_instructions();
  const int64_t groups = int64_t(sizes.element_count());
  std::vector<Weight> weights;
  if (auto error = read(*set, x, groups, panels, ys, formats, weights); error.failure()) return error;
  const int64_t rows = x.dimensions()[0], inputs = x.dimensions()[1];
  if (!fit(sizes, rows)) return ffi::Error::InvalidArgument("The sizes of the groups do not fit the rows of x.");
  if (weights.empty()) return ffi::Error::Success();
  int64_t row = 0;
  for (int64_t group = 0; group < groups; group++) {
    const int64_t own = sizes.typed_data()[group];
    multiply(pool, *set, x.typed_data() + row * inputs, own, inputs, weights);
    for (Weight& weight : weights) weight.panels += weight.count * weight.bytes, weight.y += own * 16 * weight.count;
    row += own;
  }
  for (Weight& weight : weights) std::fill_n(weight.y, (rows - row) * 16 * weight.count, 0.0f);
  return ffi::Error::Success();
}

// How a weight of floats in some precision is multiplied, and the bytes of a number; no function for other precisions.
struct OfFloats {
  void (*multiply)(const Product& p, int64_t from, int64_t to);
  int64_t bytes;
};

OfFloats of_floats(const Multiplying& set, ffi::DataType type) {
  switch (type) {
    case ffi::F32: return {set.float32, 4};
    case ffi::BF16: return {set.bfloat16, 2};
    case ffi::F16: return {set.float16, 2};
    default: return {nullptr, 0};
  }
}

// So many rows are multiplied at a time, so that their tiles take little memory.
constexpr int64_t MOST_ROWS = 256;

// The product of any number of rows.
void multiply(ffi::ThreadPool& pool, const Multiplying& set, const OfFloats& kind, Product product) {
  if (product.rows == 0 || product.outputs == 0) return;
  const bool many = product.rows > FEW_ROWS;
  const int64_t bytes = std::max<int64_t>(1, product.inputs * kind.bytes);
  // Of few rows, parts of 128 KB and not fewer than eight, so that threads end together.
  int64_t part = std::clamp<int64_t>((128 * 1024) / bytes, 1, std::max<int64_t>(1, product.outputs / 8));
  if (many) part = set.outputs * std::clamp<int64_t>(product.outputs / (8 * set.outputs * pool.num_threads()), 1, 4);
  if (product.outputs * bytes * product.rows < SMALL) part = product.outputs;
  const auto all_outputs = [&](const Product& p) {
    in_parallel(pool, (p.outputs + part - 1) / part,
                [&](int64_t i) { kind.multiply(p, i * part, std::min(p.outputs, (i + 1) * part)); });
  };
  if (!many) return all_outputs(product);
  const auto tiles_of = [&](int64_t rows) { return (rows + set.tile - 1) / set.tile; };
  const int64_t most = tiles_of(std::min(product.rows, MOST_ROWS)) * set.tile;
  const std::unique_ptr<float[]> tiles(new float[std::max<int64_t>(1, most * product.inputs)]);
  product.tiles = tiles.get();
  for (int64_t left = product.rows; left > 0; left -= MOST_ROWS) {
    product.rows = std::min(left, MOST_ROWS);
    in_parallel(pool, tiles_of(product.rows), [&](int64_t tile) { set.arrange(product, tile); });
    all_outputs(product);
    product.x += product.rows * product.inputs, product.y += product.rows * product.outputs;
  }
}

ffi::Error dense(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer w, ffi::ResultBuffer<ffi::F32> y) {
  const Multiplying* set = chosen().multiplying;
  if (!set) return no_instructions();
  const auto xs = x.dimensions(), ws = w.dimensions(), ys = y->dimensions();
  if (xs.size() != 2 || ws.size() != 2 || ys.size() != 2 || xs[1] != ws[1] || ys[0] != xs[0] || ys[1] != ws[0] ||
      xs[0] > FEW_ROWS)
    return ffi::Error::InvalidArgument("The shapes of x, w and y do not fit each other.");
  const OfFloats kind = of_floats(*set, w.element_type());
  if (!kind.multiply) return ffi::Error::InvalidArgument("The kernels have no products for the precision of w.");
  multiply(pool, *set, kind, {x.typed_data(), w.untyped_data(), y->typed_data(), xs[0], xs[1], ws[0]});
  return ffi::Error::Success();
}

ffi::Error grouped_dense(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, Sizes sizes, ffi::AnyBuffer w,
                         ffi::ResultBuffer<ffi::F32> y) {
  const Multiplying* set = chosen().multiplying;
  if (!set) return no_instructions();
  const auto xs = x.dimensions(), ws = w.dimensions(), ys = y->dimensions();
  const int64_t groups = int64_t(sizes.element_count());
  if (xs.size() != 2 || ws.size() != 3 || ys.size() != 2 || ws[0] != groups || xs[1] != ws[2] || ys[0] != xs[0] ||
      ys[1] != ws[1])
    return ffi::Error::InvalidArgument("The shapes of x, w and y do not fit each other.");
  const OfFloats kind = of_floats(*set, w.element_type());
  if (!kind.multiply) return ffi::Error::InvalidArgument("The kernels have no products for the precision of w.");
  if (!fit(sizes, xs[0])) return ffi::Error::InvalidArgument("The sizes of the groups do not fit the rows of x.");
  const auto* weight = static_cast<const uint8_t*>(w.untyped_data());
  const float* own = x.typed_data();
  float* result = y->typed_data();
  for (int64_t group = 0; group < groups; group++, weight += ws[1] * ws[2] * kind.bytes) {
    const int64_t rows = sizes.typed_data()[group];
    multiply(pool, *set, kind, {own, weight, result, rows, xs[1], ws[1]});
    own += rows * xs[1], result += rows * ws[1];
  }
  std::fill(result, y->typed_data() + xs[0] * ws[1], 0.0f);
  return ffi::Error::Success();
}

// Adds up the parts of all ranges for the queries of one row and head.
void combine(const Attention& a, int64_t row, int64_t kv_head, const float* parts, float* mixed, float* log_sum) {
  const int64_t ranges = a.ranges(), size = a.part_size(), queries = a.seq * a.group;
  const float* first = parts + (row * a.kv_heads + kv_head) * ranges * queries * size;
  for (int64_t query = 0; query < queries; query++) {
    float largest = std::numeric_limits<float>::lowest(), total = 0;
    for (int64_t range = 0; range < ranges; range++)
      largest = std::max(largest, first[(range * queries + query) * size]);
    const int64_t at = ((row * a.seq + query / a.group) * a.kv_heads + kv_head) * a.group + query % a.group;
    float* out = mixed + at * a.head_dim;
    std::fill_n(out, a.head_dim, 0.0f);
    for (int64_t range = 0; range < ranges; range++) {
      const float* part = first + (range * queries + query) * size;
      const float weight = std::exp(part[0] - largest);
      total += weight * part[1];
      for (int64_t d = 0; d < a.head_dim; d++) out[d] += weight * part[2 + d];
    }
    // A query that attends to nothing gets zeros. NaN stays NaN.
    const float inverse = total == 0 ? 0 : 1 / total;
    for (int64_t d = 0; d < a.head_dim; d++) out[d] *= inverse;
    log_sum[at] = total == 0 ? std::numeric_limits<float>::lowest() : largest + std::log(total);
  }
}

// Below this many numbers of keys, one thread is done before a second one has begun.
constexpr int64_t FEW = 16 * 1024;

ffi::Error attend(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                  ffi::Buffer<ffi::PRED> mask, ffi::RemainingArgs scales, ffi::ResultBuffer<ffi::F32> mixed,
                  ffi::ResultBuffer<ffi::F32> log_sum, float scale, std::string_view precision) {
  const Attending* set = chosen().attending;
  if (!set) return no_instructions();
  const auto qs = q.dimensions(), ks = k.dimensions(), vs = v.dimensions(), ms = mask.dimensions();
  const auto results = mixed->dimensions();
  if (qs.size() != 5 || ks.size() != 4 || ms.size() != 3)
    return ffi::Error::InvalidArgument("q must have 5 dimensions, k and v 4, the mask 3.");
  Attention a{};
  a.q = q.typed_data(), a.k = k.untyped_data(), a.v = v.untyped_data();
  a.mask = reinterpret_cast<const uint8_t*>(mask.typed_data()), a.scale = scale;
  a.batch = qs[0], a.seq = qs[1], a.kv_heads = qs[2], a.group = qs[3], a.head_dim = qs[4], a.slots = ks[2];
  if (!std::equal(ks.begin(), ks.end(), vs.begin(), vs.end()) || k.element_type() != v.element_type() ||
      ks[0] != a.batch || ks[1] != a.kv_heads || ks[3] != a.head_dim || ms[0] != a.batch || ms[1] != a.seq ||
      ms[2] != a.slots || a.head_dim % set->lanes || !std::equal(qs.begin(), qs.end(), results.begin(), results.end()) ||
      int64_t(log_sum->element_count()) != a.batch * a.seq * a.kv_heads * a.group)
    return ffi::Error::InvalidArgument("The shapes of q, k, v, the mask and the results do not fit each other.");
  const auto is = [&](const char* name, ffi::DataType stored) { return precision == name && k.element_type() == stored; };
  const auto part = is("float32", ffi::F32)    ? set->float32
                    : is("bfloat16", ffi::U16) ? set->bfloat16
                    : is("float16", ffi::U16)  ? set->float16
                    : is("int8", ffi::S8)      ? set->int8
                    : is("float8", ffi::U8)    ? set->float8
                                               : nullptr;
  if (!part) return ffi::Error::InvalidArgument("The kernels have no attention for the precision of k and v.");
  if (part == set->int8 || part == set->float8) {
    const auto of_k = scales.get<ffi::Buffer<ffi::F32>>(0), of_v = scales.get<ffi::Buffer<ffi::F32>>(1);
    const size_t count = a.batch * a.kv_heads * a.slots;
    if (!of_k || !of_v || of_k->element_count() != count || of_v->element_count() != count)
      return ffi::Error::InvalidArgument("Codes must have a scale for each slot.");
    a.k_scales = of_k->typed_data(), a.v_scales = of_v->typed_data();
  }
  const std::unique_ptr<float[]> parts(new float[a.parts_size()]);
  const int64_t units = a.batch * a.kv_heads * a.ranges();
  if (a.batch * a.kv_heads * a.slots * a.head_dim < FEW)
    for (int64_t unit = 0; unit < units; unit++) part(a, unit, parts.get());
  else
    in_parallel(pool, units, [&](int64_t unit) { part(a, unit, parts.get()); });
  for (int64_t row = 0; row < a.batch; row++)
    for (int64_t kv_head = 0; kv_head < a.kv_heads; kv_head++)
      combine(a, row, kv_head, parts.get(), mixed->typed_data(), log_sum->typed_data());
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(mistral_eqx_linear, linear,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<std::string_view>("formats"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(mistral_eqx_dense, dense,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(mistral_eqx_grouped_linear, grouped_linear,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<Sizes>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<std::string_view>("formats"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(mistral_eqx_grouped_dense, grouped_dense,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<Sizes>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(mistral_eqx_attend, attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .RemainingArgs()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("scale")
                                  .Attr<std::string_view>("precision"));

// The name of the instruction set in use; null without one.
extern "C" const char* mistral_eqx_instructions() { return chosen().instructions ? chosen().instructions->name : nullptr; }

// Whether there are products for a format.
extern "C" int mistral_eqx_has_format(const char* name) {
  return chosen().instructions && found(*chosen().instructions, name).has_value();
}
