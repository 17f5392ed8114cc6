// Dense arrays.
#pragma once

#include <memory>

#include "plan.hpp"

namespace tw {

// Copies share the numbers, which nobody changes.
struct Tensor {
    std::string dtype;
    Shape shape;
    std::shared_ptr<const void> data;

    std::size_t count() const;
    std::size_t bytes() const;
    const float* floats() const { return static_cast<const float*>(data.get()); }
    bool same(const Tensor& other) const;
};

std::size_t width_of(const std::string& dtype);  // bytes of an element
Tensor tensor_of(Floats&& numbers, Shape shape);
Tensor tensor_of(const std::string& dtype, Shape shape, const void* data);  // copies

Tensor concatenated(const std::vector<Tensor>& rows);  // along the first axis, where each has one row
Tensor row_of(const Tensor& all, std::size_t row);

// The first number that is not finite, and how many there are.
struct NotFinite {
    std::size_t count = 0;
    double first = 0;
};
NotFinite not_finite(const Tensor& tensor);

}  // namespace tw
