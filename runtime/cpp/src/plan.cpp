#include "plan.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>

namespace tw {
namespace {

constexpr double PI = 3.141592653589793;
constexpr std::int64_t MOST_STARTS = 100000, TRAINING_STEPS = 1000, WORD_MAX = 0xFFFFFFFF;

std::string text(std::int64_t number) { return std::to_string(number); }
[[noreturn]] void refuse(const std::string& complaint) { throw Error(usage, complaint); }
std::int64_t up(std::int64_t value, std::int64_t multiple) { return value <= 0 ? 1 : (value + multiple - 1) / multiple; }

std::int64_t count_of(std::int64_t length, std::int64_t tile, std::int64_t overlap) {
    return length <= overlap ? 1 : std::max<std::int64_t>(1, (length - overlap + tile - overlap - 1) / (tile - overlap));
}

Shape starts(std::int64_t length, std::int64_t tile, std::int64_t overlap) {
    if (length <= tile) return {0};
    Shape places;
    for (std::int64_t i = 0; i + 1 < count_of(length, tile, overlap); ++i) places.push_back(i * (tile - overlap));
    places.push_back(length - tile);
    return places;
}

std::vector<Floats> axis_weights(const Shape& starts, std::int64_t px, std::int64_t tile, std::int64_t overlap) {
    std::vector<double> ramp(overlap);
    for (std::int64_t i = 0; i < overlap; ++i)
        ramp[i] = 0.5 - 0.5 * std::cos(PI * (static_cast<double>(i) + 0.5) / static_cast<double>(std::max<std::int64_t>(1, overlap)));
    std::vector<std::vector<double>> raw(starts.size(), std::vector<double>(tile, 1.0));
    for (std::size_t i = 0; i + 1 < raw.size(); ++i) {
        std::reverse_copy(ramp.begin(), ramp.end(), raw[i].end() - overlap);
        std::copy(ramp.begin(), ramp.end(), raw[i + 1].begin());
    }
    std::vector<double> total(starts.back() / px + tile, 0.0);
    for (std::size_t i = 0; i < raw.size(); ++i)
        for (std::int64_t x = 0; x < tile; ++x) total[starts[i] / px + x] += raw[i][x];
    std::vector<Floats> weights;
    for (std::size_t i = 0; i < raw.size(); ++i) {
        Floats& weight = weights.emplace_back(tile);
        for (std::int64_t x = 0; x < tile; ++x) weight[x] = static_cast<float>(raw[i][x] / total[starts[i] / px + x]);
    }
    return weights;
}

// As numpy.linspace: multiples of one step, and the exact end.
std::vector<double> linspace(double start, double end, std::int64_t count) {
    std::vector<double> values(count);
    double step = count > 1 ? (end - start) / static_cast<double>(count - 1) : 0.0;
    for (std::int64_t i = 0; i < count; ++i) values[i] = static_cast<double>(i) * step + start;
    if (count > 1) values.back() = end;
    return values;
}

Floats rounded(const std::vector<double>& values) { return {values.begin(), values.end()}; }

void check_count(std::int64_t count, std::int64_t most) {
    if (count < 1 || (most && count > most))
        refuse("count=" + text(count) + " is no number of steps; use " + (most ? "1 to " + text(most) : "1 or more"));
}

double number(const Named<Scalar>& options, const char* name, double standard) {
    auto option = options.find(name);
    return option == options.end() ? standard : option->second.number;
}

Tables flow_shift(std::int64_t count, std::int64_t tokens, const Named<Scalar>& options) {
    check_count(count, 0);
    if (tokens < 1) refuse("tokens=" + text(tokens) + " is no token count; use 1 or more");
    double base_shift = number(options, "base_shift", 0.5), max_shift = number(options, "max_shift", 1.15);
    auto base_tokens = static_cast<std::int64_t>(number(options, "base_tokens", 256));
    auto max_tokens = static_cast<std::int64_t>(number(options, "max_tokens", 4096));
    if (base_tokens <= 0 || base_tokens >= max_tokens)
        refuse("base_tokens=" + text(base_tokens) + ", max_tokens=" + text(max_tokens) + " give no line; use 0 < base < max");
    double mu = base_shift + static_cast<double>(tokens - base_tokens) * (max_shift - base_shift) / static_cast<double>(max_tokens - base_tokens);
    mu = std::min(std::max(mu, number(options, "min_mu", mu)), number(options, "max_mu", INFINITY));
    if (!(std::fabs(mu) <= 100)) refuse("a shift of " + repr(mu) + " leaves no steps; bound it between -100 and 100");
    double shift = std::exp(mu);
    std::vector<double> sigma = linspace(1.0, 1.0 / static_cast<double>(count), count), next;
    for (double& value : sigma) value = shift / (shift + (1.0 / value - 1.0));
    next.assign(sigma.begin() + 1, sigma.end());
    next.push_back(0.0);
    return {{"sigma", rounded(sigma)}, {"sigma_next", rounded(next)}};
}

std::vector<double> alpha_bar(const Named<Scalar>& options) {
    const std::string& betas = options.at("betas").text;
    if (betas != "linear" && betas != "scaled_linear") refuse("betas=" + repr(betas) + " is not one of linear, scaled_linear");
    const Scalar &start = options.at("beta_start"), &end = options.at("beta_end");
    if (!(0 < start.number && start.number <= end.number && end.number < 1))
        refuse("beta_start=" + start.repr() + ", beta_end=" + end.repr() + " is no noise schedule; use 0 < beta_start <= beta_end < 1");
    bool scaled = betas == "scaled_linear";
    auto root = [&](double value) { return scaled ? std::pow(value, 0.5) : value; };
    std::vector<double> bar = linspace(root(start.number), root(end.number), TRAINING_STEPS);
    double product = 1.0;
    for (double& value : bar) value = product *= 1.0 - (scaled ? value * value : value);
    return bar;
}

void check_final(const Named<Scalar>& options) {
    const std::string& final_alpha = options.at("final_alpha").text;
    if (final_alpha != "first" && final_alpha != "one") refuse("final_alpha=" + repr(final_alpha) + " is not one of first, one");
}

// Falling time steps with leading spacing: multiples of the stride plus the offset.
Shape timesteps(std::int64_t count, const Scalar& offset) {
    check_count(count, TRAINING_STEPS);
    std::int64_t stride = TRAINING_STEPS / count, largest = TRAINING_STEPS - 1 - (count - 1) * stride;
    if (offset.integer < 0 || offset.integer > largest)
        refuse("spacing_offset=" + offset.repr() + " with " + text(count) + " steps leaves the schedule; use 0 to " + text(largest));
    Shape t;
    for (std::int64_t i = count - 1; i >= 0; --i) t.push_back(i * stride + offset.integer);
    return t;
}

Tables diffusion(bool ancestral, std::int64_t count, const Named<Scalar>& options) {
    std::vector<double> bar = alpha_bar(options);
    check_final(options);
    Shape t = timesteps(count, options.at("spacing_offset"));
    double last = ancestral || options.at("final_alpha").text == "one" ? 1.0 : bar[0];
    Tables tables;
    for (std::size_t i = 0; i < t.size(); ++i) {
        std::int64_t after = ancestral ? (i + 1 < t.size() ? t[i + 1] : -1) : t[i] - TRAINING_STEPS / count;
        double now = bar[t[i]], next = after >= 0 ? bar[after] : last;
        auto put = [&](const char* name, double value) { tables[name].push_back(static_cast<float>(value)); };
        put("t", static_cast<double>(t[i]));
        put("alpha", std::sqrt(now));
        put("beta", std::sqrt(1 - now));
        if (ancestral) {
            double step = now / next, remaining = (1 - next) / (1 - now);
            put("x0_weight", std::sqrt(next) * (1 - step) / (1 - now));
            put("z_weight", std::sqrt(step) * remaining);
            put("noise_weight", std::sqrt(remaining * (1 - step)));
        } else {
            put("alpha_next", std::sqrt(next));
            put("beta_next", std::sqrt(1 - next));
        }
    }
    return tables;
}

}  // namespace

std::int64_t product(const Shape& shape) {
    std::int64_t all = 1;
    for (auto size : shape)
        if (__builtin_mul_overflow(all, size, &all)) throw Error(resource, "an array of " + repr(shape) + " is larger than any memory");
    return all;
}

Tile TilePlan::tile(std::int64_t index) const {
    auto columns = static_cast<std::int64_t>(lefts.size());
    return {index, tops[index / columns], lefts[index % columns], tile_height, tile_width};
}

TilePlan tile_plan(std::int64_t width, std::int64_t height, std::int64_t tile, std::int64_t overlap, std::int64_t multiple) {
    if (multiple < 1) refuse("multiple=" + text(multiple) + " is no size; use 1 or more");
    for (auto [name, value] : {std::pair{"width", width}, {"height", height}, {"tile", tile}})
        if (value < 1 || value % multiple)
            refuse(std::string(name) + "=" + text(value) + " is not a positive multiple of " + text(multiple) + "; use " + text(up(value, multiple) * multiple));
    if (overlap < 0 || overlap > tile / 2 || overlap % multiple)
        refuse("overlap=" + text(overlap) + " does not fit tile=" + text(tile) + "; use a multiple of " + text(multiple) + " from 0 to " +
               text(tile / 2 / multiple * multiple));
    std::int64_t side = std::max(width, height);
    if (count_of(side, tile, overlap) > MOST_STARTS)
        refuse("a side of " + text(side) + " px is more than " + text(MOST_STARTS) + " tiles of " + text(tile) +
               " px; use a larger tile or a smaller image");
    return {height, width, std::min(tile, height), std::min(tile, width), overlap, starts(height, tile, overlap), starts(width, tile, overlap)};
}

constexpr std::uint32_t MOVES = 0xFFFFFFFF;  // the region of the noise that moves tiles

TilePlan moved(TilePlan plan, std::int64_t multiple, std::int64_t seed, std::int64_t step) {
    std::int64_t most = plan.overlap / 2 / multiple;
    auto words = philox4x32({static_cast<std::uint32_t>(step), 0, 0, 0}, {static_cast<std::uint32_t>(seed), MOVES});
    auto move = [&](Shape& starts, std::uint32_t word) {
        std::int64_t by = (word % (2 * most + 1) - most) * multiple;
        // the last tile may lie less than a pitch after the one before it
        for (std::size_t i = 1; i + 1 < starts.size(); ++i) starts[i] = std::min(starts[i] + by, starts.back() - multiple);
    };
    move(plan.tops, words[0]);
    move(plan.lefts, words[1]);
    return plan;
}

std::pair<std::vector<Floats>, std::vector<Floats>> tile_weights(const TilePlan& plan, std::int64_t px) {
    Shape sizes = {plan.height, plan.width, plan.tile_height, plan.tile_width, plan.overlap};
    sizes.insert(sizes.end(), plan.tops.begin(), plan.tops.end());
    sizes.insert(sizes.end(), plan.lefts.begin(), plan.lefts.end());
    std::int64_t common = 0;
    for (auto size : sizes) common = std::gcd(common, size);
    if (px < 1 || common % px) refuse("px=" + text(px) + " does not divide the tile plan; use a divisor of " + text(common));
    return {axis_weights(plan.tops, px, plan.tile_height / px, plan.overlap / px),
            axis_weights(plan.lefts, px, plan.tile_width / px, plan.overlap / px)};
}

Tables schedule(const Steps& steps, std::int64_t count, std::int64_t tokens) {
    if (steps.schedule == "flow_shift") return flow_shift(count, tokens, steps.options);
    return diffusion(steps.schedule == "ddpm", count, steps.options);
}

std::array<std::uint32_t, 4> philox4x32(std::array<std::uint32_t, 4> c, std::array<std::uint32_t, 2> key) {
    for (std::uint32_t i = 0; i < 10; ++i) {
        std::uint64_t p0 = std::uint64_t{0xD2511F53} * c[0], p1 = std::uint64_t{0xCD9E8D57} * c[2];
        c = {static_cast<std::uint32_t>(p1 >> 32) ^ c[1] ^ (key[0] + i * 0x9E3779B9U), static_cast<std::uint32_t>(p1),
             static_cast<std::uint32_t>(p0 >> 32) ^ c[3] ^ (key[1] + i * 0xBB67AE85U), static_cast<std::uint32_t>(p0)};
    }
    return c;
}

Floats normal(std::int64_t seed, std::int64_t region, std::int64_t stream, std::int64_t channels, std::int64_t top, std::int64_t left,
              std::int64_t height, std::int64_t width) {
    for (auto [name, value] : {std::pair{"seed", seed}, {"region", region}, {"stream", stream}, {"top", top}, {"left", left}})
        if (value < 0 || value > WORD_MAX)
            refuse(std::string(name) + "=" + text(value) + " does not fit in 32 bits; use a whole number from 0 to " + text(WORD_MAX));
    auto word = [](std::int64_t value) { return static_cast<std::uint32_t>(value); };
    Floats field;
    field.reserve(product({channels, height, width}));
    for (std::int64_t c = 0; c < channels; ++c)
        for (std::int64_t y = top; y < top + height; ++y)
            for (std::int64_t x = left; x < left + width; ++x) {
                auto words = philox4x32({word(x), word(y), word(c), word(stream)}, {word(seed), word(region)});
                double u1 = (static_cast<double>(words[0]) + 1) * 0x1p-32, u2 = static_cast<double>(words[1]) * 0x1p-32;
                field.push_back(static_cast<float>(std::sqrt(-2 * std::log(u1)) * std::cos(2 * PI * u2)));
            }
    return field;
}

std::int64_t least_px(const Program& program, std::optional<std::int64_t> tile, std::int64_t shortest) {
    std::int64_t least = shortest;
    for (const auto& p : program.passes)
        if (p.tiles && !p.tiles->fixed_px.empty()) least = std::max(least, tile && *tile ? *tile : p.tiles->px);
    return least;
}

TilePlan plan_of(const Program& program, const Pass& p, std::int64_t height, std::int64_t width, std::optional<std::int64_t> tile,
                 std::optional<std::int64_t> overlap) {
    TilePlan whole = tile_plan(width, height, std::max(width, height), 0, program.multiple_px);
    if (!p.tiles) return whole;
    if (auto direct = p.tiles->whole_up_to_px; !tile && direct) {
        auto [short_side, long_side] = std::minmax((*direct)[0], (*direct)[1]);
        if (std::min(height, width) <= short_side && std::max(height, width) <= long_side) return whole;
    }
    std::int64_t size = tile.value_or(p.tiles->px);
    const Shape& fixed = p.tiles->fixed_px;
    if (!fixed.empty() && std::find(fixed.begin(), fixed.end(), size) == fixed.end())
        refuse("tile=" + text(size) + " is not one of the sizes this bundle is made for: " + repr(fixed));
    std::int64_t fitting = std::min(p.tiles->overlap_px, size / 2) / program.multiple_px * program.multiple_px;
    return tile_plan(width, height, size, overlap.value_or(fitting), program.multiple_px);
}

std::optional<std::int64_t> smaller_tile(const Program& program, const Named<TilePlan>& plans, std::optional<std::int64_t> overlap, std::int64_t shortest) {
    std::int64_t side = 0, least = 0;
    for (const auto& p : program.passes) {
        if (!p.tiles) continue;
        const TilePlan& plan = plans.at(p.name);
        side = std::max({side, plan.tile_height, plan.tile_width});
        least = std::max(least, 2 * overlap.value_or(p.tiles->overlap_px));
    }
    least = std::max(least, shortest);
    std::optional<std::set<std::int64_t>> fixed;  // the sides that all passes with fixed sides take
    std::int64_t half = side / 2;
    for (const auto& p : program.passes) {
        if (!p.tiles) continue;
        if (p.tiles->px < side) half = std::min(half, p.tiles->px);  // of an image that was taken whole
        if (p.tiles->fixed_px.empty()) continue;
        std::set<std::int64_t> both;
        for (auto px : p.tiles->fixed_px)
            if (!fixed || fixed->count(px)) both.insert(px);
        fixed = both;
    }
    if (fixed) {
        std::optional<std::int64_t> best;
        for (auto px : *fixed)
            if (px >= least && px < side) best = px;
        return best;
    }
    least = up(std::max<std::int64_t>(least, 1), program.multiple_px) * program.multiple_px;
    std::int64_t smaller = std::max(least, half / program.multiple_px * program.multiple_px);
    return smaller < side ? std::optional(smaller) : std::nullopt;
}

Layout layout(const Program& program, std::int64_t height, std::int64_t width, std::optional<std::int64_t> tile,
              std::optional<std::int64_t> overlap, std::optional<std::int64_t> steps) {
    Layout lay;
    for (const auto& p : program.passes) {
        const TilePlan& plan = lay.plans[p.name] = plan_of(program, p, height, width, tile, overlap);
        Tables& tables = lay.tables[p.name];
        if (!p.steps) continue;
        std::int64_t count = steps.value_or(p.steps->count), tokens = plan.tile_height * plan.tile_width / p.steps->px_per_token;
        tables = schedule(*p.steps, count, tokens);
        lay.steps[p.name] = count;
    }
    return lay;
}

}  // namespace tw
