// Tiles, schedules and noise. Pure: the numbers that docs/conformance.md specifies.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "documents.hpp"

namespace tw {

using Floats = std::vector<float>;

std::int64_t product(const Shape& shape);  // throws Error(resource) beyond 64 bits

struct Tile {
    std::int64_t index, top, left, height, width;

    bool operator==(const Tile& o) const { return top == o.top && left == o.left && height == o.height && width == o.width; }
};

struct TilePlan {
    std::int64_t height = 0, width = 0, tile_height = 0, tile_width = 0, overlap = 0;
    Shape tops, lefts;

    bool operator==(const TilePlan& o) const {
        return height == o.height && width == o.width && tile_height == o.tile_height && tile_width == o.tile_width && tops == o.tops && lefts == o.lefts;
    }
    std::int64_t count() const { return static_cast<std::int64_t>(tops.size() * lefts.size()); }
    Tile tile(std::int64_t index) const;
};

TilePlan tile_plan(std::int64_t width, std::int64_t height, std::int64_t tile, std::int64_t overlap, std::int64_t multiple);
// The plan with its inner tiles moved by offsets that depend only on the seed and the step.
TilePlan moved(TilePlan plan, std::int64_t multiple, std::int64_t seed, std::int64_t step);
// The weights of each row and of each column of tiles, for a grid whose cells have `px` output pixels.
std::pair<std::vector<Floats>, std::vector<Floats>> tile_weights(const TilePlan& plan, std::int64_t px);

using Tables = Named<Floats>;
Tables schedule(const Steps& steps, std::int64_t count, std::int64_t tokens);

std::array<std::uint32_t, 4> philox4x32(std::array<std::uint32_t, 4> counter, std::array<std::uint32_t, 2> key);
// The crop [channels, height, width] at (top, left) of an endless field of normal noise.
Floats normal(std::int64_t seed, std::int64_t region, std::int64_t stream, std::int64_t channels, std::int64_t top, std::int64_t left,
              std::int64_t height, std::int64_t width);

// The shortest side of a padded image.
std::int64_t least_px(const Program& program, std::optional<std::int64_t> tile, std::int64_t shortest);
TilePlan plan_of(const Program& program, const Pass& p, std::int64_t height, std::int64_t width, std::optional<std::int64_t> tile,
                 std::optional<std::int64_t> overlap);
// The side of the next smaller tiles for all passes: a fixed side, or half, with room for both overlaps.
std::optional<std::int64_t> smaller_tile(const Program& program, const Named<TilePlan>& plans, std::optional<std::int64_t> overlap, std::int64_t shortest);

// All that depends on the size of an image and not on its pixels.
struct Layout {
    Named<TilePlan> plans;
    Named<Tables> tables;
    Named<std::int64_t> steps;
};
Layout layout(const Program& program, std::int64_t height, std::int64_t width, std::optional<std::int64_t> tile,
              std::optional<std::int64_t> overlap, std::optional<std::int64_t> steps);

}  // namespace tw
