#include "tensor.hpp"

#include <cmath>
#include <cstring>

namespace tw {
namespace {

// Whether the exponent of a number has all of its bits, as those of infinity and NaN.
template <class Bits>
NotFinite count(const Tensor& tensor, Bits exponent) {
    const char* bytes = static_cast<const char*>(tensor.data.get());
    NotFinite found;
    for (std::size_t i = 0; i < tensor.count(); ++i) {
        Bits bits;
        std::memcpy(&bits, bytes + i * sizeof bits, sizeof bits);
        found.count += (bits & exponent) == exponent;
    }
    return found;
}

}  // namespace

std::size_t width_of(const std::string& dtype) {
    static const std::map<std::string, std::size_t> widths = {{"float64", 8}, {"int64", 8},   {"float32", 4}, {"int32", 4},
                                                              {"float16", 2}, {"bfloat16", 2}, {"int16", 2}};
    auto width = widths.find(dtype);
    return width == widths.end() ? 1 : width->second;
}

std::size_t Tensor::count() const { return static_cast<std::size_t>(product(shape)); }
std::size_t Tensor::bytes() const { return count() * width_of(dtype); }

bool Tensor::same(const Tensor& other) const {
    if (dtype != other.dtype || shape != other.shape) return false;
    return data == other.data || std::memcmp(data.get(), other.data.get(), bytes()) == 0;
}

Tensor tensor_of(Floats&& numbers, Shape shape) {
    auto owner = std::make_shared<Floats>(std::move(numbers));
    return {"float32", std::move(shape), std::shared_ptr<const void>(owner, owner->data())};
}

Tensor tensor_of(const std::string& dtype, Shape shape, const void* data) {
    Tensor tensor{dtype, std::move(shape), nullptr};
    auto bytes = std::shared_ptr<char[]>(new char[tensor.bytes()]);
    if (tensor.bytes()) std::memcpy(bytes.get(), data, tensor.bytes());
    tensor.data = bytes;
    return tensor;
}

Tensor concatenated(const std::vector<Tensor>& rows) {
    const Tensor& first = rows[0];
    Shape shape = first.shape;
    shape[0] = static_cast<std::int64_t>(rows.size());
    std::size_t size = first.bytes();
    auto data = std::shared_ptr<char[]>(new char[size * rows.size()]);
    for (std::size_t i = 0; i < rows.size(); ++i) {
        if (rows[i].shape != first.shape || rows[i].dtype != first.dtype) throw Error(internal, "rows of one call differ in shape");
        std::memcpy(data.get() + i * size, rows[i].data.get(), size);
    }
    return {first.dtype, shape, data};
}

Tensor row_of(const Tensor& all, std::size_t row) {
    Shape shape = all.shape;
    shape[0] = 1;
    std::size_t size = all.bytes() / static_cast<std::size_t>(all.shape[0]);
    return {all.dtype, shape, std::shared_ptr<const void>(all.data, static_cast<const char*>(all.data.get()) + row * size)};
}

NotFinite not_finite(const Tensor& tensor) {
    NotFinite found;
    if (tensor.dtype == "float32") found = count<std::uint32_t>(tensor, 0x7F800000);
    if (tensor.dtype == "float64") found = count<std::uint64_t>(tensor, 0x7FF0000000000000);
    if (tensor.dtype == "float16") found = count<std::uint16_t>(tensor, 0x7C00);
    if (!found.count) return found;
    found.first = NAN;
    for (std::size_t i = 0; tensor.dtype == "float32" && i < tensor.count(); ++i)
        if (!std::isfinite(tensor.floats()[i])) return {found.count, static_cast<double>(tensor.floats()[i])};
    return found;
}

}  // namespace tw
