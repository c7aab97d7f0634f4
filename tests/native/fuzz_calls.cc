// Calls as XLA makes them, of random shapes, each array in a buffer of exactly its size. A call that fits is done; one
// with another shape, or with groups that do not fit the rows, is refused.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "panels.h"
#include "xla/ffi/api/c_api.h"

extern "C" {
XLA_FFI_Handler mistral_eqx_linear, mistral_eqx_grouped_linear, mistral_eqx_dense, mistral_eqx_grouped_dense;
XLA_FFI_Handler mistral_eqx_attend;
}

struct XLA_FFI_Error {};

namespace {

XLA_FFI_Error* create(XLA_FFI_Error_Create_Args*) {
  static XLA_FFI_Error error;
  return &error;
}

XLA_FFI_Error* schedule(XLA_FFI_ThreadPool_Schedule_Args* task) {
  task->task(task->data);
  return nullptr;
}

XLA_FFI_Error* count_threads(XLA_FFI_ThreadPool_NumThreads_Args* threads) {
  *threads->num_threads = 3;
  return nullptr;
}

const XLA_FFI_Api& api() {
  static const XLA_FFI_Api found = [] {
    XLA_FFI_Api api{};
    api.struct_size = XLA_FFI_Api_STRUCT_SIZE;
    api.XLA_FFI_Error_Create = create;
    api.XLA_FFI_Error_GetMessage = [](XLA_FFI_Error_GetMessage_Args* error) { error->message = ""; };
    api.XLA_FFI_Error_Destroy = [](XLA_FFI_Error_Destroy_Args*) {};
    api.XLA_FFI_ThreadPool_Schedule = schedule;
    api.XLA_FFI_ThreadPool_NumThreads = count_threads;
    return api;
  }();
  return found;
}

struct Array {
  XLA_FFI_DataType type;
  std::vector<int64_t> dims;

  int64_t bytes() const {
    int64_t bytes = type == XLA_FFI_DataType_F32 || type == XLA_FFI_DataType_S32 ? 4
                    : type == XLA_FFI_DataType_BF16 || type == XLA_FFI_DataType_F16 || type == XLA_FFI_DataType_U16 ? 2
                                                                                                                      : 1;
    for (int64_t size : dims) bytes *= size;
    return bytes;
  }
};

// A call, and its attributes: strings, and a scale for attention.
struct Call {
  XLA_FFI_Handler* handler;
  std::vector<Array> arguments, results;
  std::vector<std::pair<std::string, std::string>> attributes;
  std::vector<int32_t> sizes;  // Of groups, which are the second argument.

  // Whether it is done, and not refused.
  bool run(std::mt19937& draw) {
    std::vector<std::unique_ptr<uint8_t[]>> memory;
    std::vector<XLA_FFI_Buffer> buffers;
    buffers.reserve(arguments.size() + results.size());
    std::vector<void*> given, made;
    const auto add = [&](Array& array, std::vector<void*>& to) {
      const int64_t bytes = array.bytes();
      uint8_t* data = memory.emplace_back(new uint8_t[bytes]).get();
      for (int64_t i = 0; i < bytes; i++) data[i] = uint8_t(draw());
      if (array.type == XLA_FFI_DataType_PRED)
        for (int64_t i = 0; i < bytes; i++) data[i] &= 1;
      if (array.type == XLA_FFI_DataType_F32)
        for (int64_t i = 0; i < bytes / 4; i++) {
          const float number = float(draw()) / 2e9f - 1;
          std::memcpy(data + 4 * i, &number, 4);
        }
      if (array.type == XLA_FFI_DataType_S32) {
        std::memset(data, 0, bytes);
        std::memcpy(data, sizes.data(), std::min<int64_t>(bytes, 4 * sizes.size()));
      }
      buffers.push_back({XLA_FFI_Buffer_STRUCT_SIZE, nullptr, array.type, data, int64_t(array.dims.size()), array.dims.data()});
      to.push_back(&buffers.back());
    };
    for (Array& array : arguments) add(array, given);
    for (Array& array : results) add(array, made);
    float number = 0.1f;
    XLA_FFI_Scalar scale{XLA_FFI_DataType_F32, &number};
    std::vector<XLA_FFI_ByteSpan> names, values;
    std::vector<XLA_FFI_ByteSpan*> named;
    std::vector<XLA_FFI_AttrType> kinds;
    std::vector<void*> valued;
    for (const auto& [name, value] : attributes) {
      names.push_back({name.data(), name.size()}), values.push_back({value.data(), value.size()});
    }
    for (size_t i = 0; i < attributes.size(); i++) {
      const bool is_scale = attributes[i].first == "scale";
      named.push_back(&names[i]), valued.push_back(is_scale ? (void*)&scale : (void*)&values[i]);
      kinds.push_back(is_scale ? XLA_FFI_AttrType_SCALAR : XLA_FFI_AttrType_STRING);
    }
    std::vector<XLA_FFI_ArgType> of_given(given.size(), XLA_FFI_ArgType_BUFFER);
    std::vector<XLA_FFI_RetType> of_made(made.size(), XLA_FFI_RetType_BUFFER);
    XLA_FFI_CallFrame frame{};
    frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE, frame.api = &api(), frame.stage = XLA_FFI_ExecutionStage_EXECUTE;
    frame.args = {XLA_FFI_Args_STRUCT_SIZE, nullptr, int64_t(given.size()), of_given.data(), given.data()};
    frame.rets = {XLA_FFI_Rets_STRUCT_SIZE, nullptr, int64_t(made.size()), of_made.data(), made.data()};
    frame.attrs = {XLA_FFI_Attrs_STRUCT_SIZE, nullptr, int64_t(named.size()), kinds.data(), named.data(), valued.data()};
    return handler(&frame) == nullptr;
  }
};

constexpr XLA_FFI_DataType F32 = XLA_FFI_DataType_F32, U8 = XLA_FFI_DataType_U8, S32 = XLA_FFI_DataType_S32;
constexpr XLA_FFI_DataType FLOATS[] = {F32, XLA_FFI_DataType_BF16, XLA_FFI_DataType_F16};
// A format of each kind, and its numbers and bytes of a block.
struct Named {
  const char* name;
  int64_t size, bytes;
};
constexpr Named FORMATS[] = {{"Q4_1", 32, 20},   {"Q6_K", 256, 210},  {"BF16", 1, 2},       {"INT8", 1, 1}, {"INT4/64", 64, 37},
                             {"NF4/32", 32, 20}, {"FP8/64", 64, 68}, {"NF4D/128", 128, 80}, {"NVFP4", 16, 9}};

// Sizes of groups that fit the rows.
std::vector<int32_t> random_sizes(std::mt19937& draw, int64_t groups, int64_t rows) {
  std::vector<int32_t> sizes(groups);
  for (int32_t& size : sizes) rows -= size = int32_t(draw() % unsigned(rows + 1));
  std::shuffle(sizes.begin(), sizes.end(), draw);
  return sizes;
}

Call linear(std::mt19937& draw, bool grouped) {
  const auto below = [&](int limit) { return int64_t(draw() % unsigned(limit)); };
  const int64_t rows = 1 + below(40), inputs = 256 * (1 + below(2)), groups = 1 + below(5), count = 1 + below(3);
  Call call{grouped ? mistral_eqx_grouped_linear : mistral_eqx_linear, {{F32, {rows, inputs}}}, {}, {}, {}};
  if (grouped) call.arguments.push_back({S32, {groups}}), call.sizes = random_sizes(draw, groups, rows);
  std::string names;
  for (int64_t i = 0; i < count; i++) {
    const Named& one = FORMATS[below(std::size(FORMATS))];
    const int64_t panels = 1 + below(3);
    Array array{U8, {panels, inputs / one.size, 16 * one.bytes}};
    if (grouped) array.dims.insert(array.dims.begin(), groups);
    call.arguments.push_back(array), call.results.push_back({F32, {rows, 16 * panels}});
    names += (i ? " " : "") + std::string(one.name);
  }
  call.attributes = {{"formats", names}};
  return call;
}

Call dense(std::mt19937& draw, bool grouped) {
  const auto below = [&](int limit) { return int64_t(draw() % unsigned(limit)); };
  const int64_t rows = 1 + below(grouped ? 20 : 8), inputs = 1 + below(100), outputs = 1 + below(40), groups = 1 + below(5);
  Call call{grouped ? mistral_eqx_grouped_dense : mistral_eqx_dense, {{F32, {rows, inputs}}}, {}, {}, {}};
  if (grouped) call.arguments.push_back({S32, {groups}}), call.sizes = random_sizes(draw, groups, rows);
  Array weight{FLOATS[below(3)], {outputs, inputs}};
  if (grouped) weight.dims.insert(weight.dims.begin(), groups);
  call.arguments.push_back(weight), call.results.push_back({F32, {rows, outputs}});
  return call;
}

Call attend(std::mt19937& draw) {
  const auto below = [&](int limit) { return int64_t(draw() % unsigned(limit)); };
  const int64_t batch = 1 + below(2), seq = 1 + below(3), heads = 1 + below(3), group = 1 + below(4), slots = 1 + below(300);
  const int64_t size = 16 * (1 + below(5)), kind = below(5);
  const char* names[] = {"float32", "bfloat16", "float16", "int8", "float8"};
  const XLA_FFI_DataType stored[] = {F32, XLA_FFI_DataType_U16, XLA_FFI_DataType_U16, XLA_FFI_DataType_S8, U8};
  const Array q{F32, {batch, seq, heads, group, size}}, k{stored[kind], {batch, heads, slots, size}};
  Call call{mistral_eqx_attend, {q, k, k, {XLA_FFI_DataType_PRED, {batch, seq, slots}}}, {}, {}, {}};
  for (int i = 0; i < 2 && kind >= 3; i++) call.arguments.push_back({F32, {batch, heads, slots}});
  call.results = {q, {F32, {batch, seq, heads, group, 1}}};
  call.attributes = {{"precision", names[kind]}, {"scale", ""}};
  return call;
}

void expect(bool fine, const char* what) {
  if (fine) return;
  std::fprintf(stderr, "%s\n", what);
  std::abort();
}

}  // namespace

// A call as it should be, and with something changed.
void call(std::mt19937& draw) {
  const auto below = [&](int limit) { return int64_t(draw() % unsigned(limit)); };
  const int64_t kind = below(5);
  const Call good = kind < 2 ? linear(draw, kind == 1) : kind < 4 ? dense(draw, kind == 3) : attend(draw);
  Call done = good;
  expect(done.run(draw), "A call that fits is refused.");
  Call bad = good;
  const int64_t count = int64_t(good.arguments.size()), at = below(int(count + good.results.size()));
  Array& array = at < count ? bad.arguments[at] : bad.results[at - count];
  int64_t& size = array.dims[below(int(array.dims.size()))];
  size = size > 1 && below(2) ? below(int(size)) : size + 1 + below(3);
  expect(!bad.run(draw), "Shapes that do not fit are not refused.");
  bad = good;
  bad.arguments.pop_back();
  bad.run(draw);
  if (good.sizes.empty()) return;
  const int64_t rows = good.arguments[0].dims[0];
  for (const int64_t wrong : {int64_t(-1), int64_t(INT32_MIN), rows + 1, int64_t(INT32_MAX), rows + 1 + below(1000)}) {
    bad = good;
    bad.sizes[below(int(bad.sizes.size()))] = int32_t(wrong);
    expect(!bad.run(draw), "Groups that do not fit the rows are not refused.");
  }
  bad.sizes.assign(bad.sizes.size(), INT32_MAX);
  expect(!bad.run(draw), "Groups that do not fit the rows are not refused.");
}
