// The functions of tilewright.h.
#include "tilewright.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <new>

#include "images.hpp"
#include "inputs.hpp"
#include "walk.hpp"

#ifndef TW_VERSION
#define TW_VERSION "0"
#endif

namespace tw {
namespace {

constexpr std::int64_t MOST_PIXELS = 100000000;  // of an input image, as the command line
constexpr std::int64_t MOST_SEED = 0xFFFFFFFF;

// A caller's exception, which must not pass through C.
struct Thrown {};

struct Opened {
    Bundle bundle;
    EngineOptions options;
    std::optional<Path> weights_dir;
    Named<const EngineSpec*> specs;  // component -> its engine
    Named<Signature> signatures;
    Named<Tensor> constants;
    std::vector<std::pair<std::string, Argument>> arguments;
    Named<std::unique_ptr<Engine>> engines;
    std::mutex running;
    std::mutex telling;
    std::string error;

    Engine& engine(const std::string& component) {
        std::unique_ptr<Engine>& engine = engines[component];
        if (!engine) {
            const EngineSpec& spec = *specs.at(component);
            Named<Path> files = bundle.files_of(spec.weights && !spec.weights->empty() ? *spec.weights : component, weights_dir);
            engine = open_ort(bundle.root / spec.files[0], files, spec.precision, options);
        }
        return *engine;
    }
};

// Handles are numbers, so a closed one never meets another bundle.
std::mutex lock_of_handles;
std::map<std::uintptr_t, std::shared_ptr<Opened>>& handles() {
    static std::map<std::uintptr_t, std::shared_ptr<Opened>> all;
    return all;
}

thread_local std::string thread_error, thread_text;
thread_local Strings thread_texts;
thread_local std::int32_t thread_status = TW_OK;

std::shared_ptr<Opened> opened(const tw_bundle* handle) {
    if (!handle) throw Error(usage, "the bundle is NULL; tw_last_error(NULL) says why tw_open failed");
    std::lock_guard guard(lock_of_handles);
    auto entry = handles().find(reinterpret_cast<std::uintptr_t>(handle));
    if (entry == handles().end()) throw Error(usage, "the bundle is closed; open it again");
    return entry->second;
}

std::int32_t failed(const tw_bundle* handle, std::int32_t code, const std::string& message) noexcept {
    thread_status = code;
    try {
        thread_error = one_line(message, 800);
        std::lock_guard guard(lock_of_handles);
        auto entry = handles().find(reinterpret_cast<std::uintptr_t>(handle));
        if (entry == handles().end()) return code;
        std::lock_guard telling(entry->second->telling);
        entry->second->error = thread_error;
    } catch (...) {  // no memory for a message
    }
    return code;
}

template <class Function>
std::int32_t guarded(const tw_bundle* handle, Function function) noexcept {
    try {
        function();
        return TW_OK;
    } catch (const Error& error) {
        return failed(handle, error.code, error.what());
    } catch (const Thrown&) {
        return failed(handle, TW_ERROR, "a callback threw an exception; let it set a flag that is_cancelled returns");
    } catch (const std::bad_alloc&) {
        return failed(handle, TW_RESOURCE, "too little memory; use smaller tiles or low_memory");
    } catch (const std::exception& error) {
        return failed(handle, TW_ERROR, std::string("internal error: ") + error.what());
    } catch (...) {
        return failed(handle, TW_ERROR, "internal error");
    }
}

template <class... Types, class... Values>
auto told(void (*callback)(Types...), Values... values) {
    try {
        callback(values...);
    } catch (...) {
        throw Thrown();
    }
}

// The caller's struct, which may be shorter than ours: what it lacks keeps its default.
template <class Struct>
Struct complete(const Struct* given, Struct standard, const char* name, const char* defaults) {
    if (!given) return standard;
    if (given->size < sizeof(std::size_t) || given->size > sizeof(Struct))
        throw Error(usage, std::string(name) + ".size " + std::to_string(given->size) + " is of no version up to this one; begin with " + defaults + "()");
    std::memcpy(&standard, given, given->size);
    standard.size = sizeof(Struct);
    return standard;
}

// ---- engines

std::vector<std::int64_t> numbers_of(const std::string& version) {
    std::vector<std::int64_t> numbers;
    for (std::size_t at = 0; at < version.size() && version[at] >= '0' && version[at] <= '9';) {
        std::size_t used = 0;
        numbers.push_back(std::stoll(version.substr(at, 9), &used));
        at += used + 1;
        if (at > version.size() || version[at - 1] != '.') break;
    }
    while (!numbers.empty() && numbers.back() == 0) numbers.pop_back();
    return numbers;
}

std::string misfit(const EngineSpec& spec, std::optional<std::int64_t> side) {
    if (spec.device != "cpu") return "runs on " + spec.device + ", and this library runs on the CPU only";
    if (spec.backend != "ort") return "has the backend " + repr(spec.backend) + ", and this library has ONNX Runtime only";
    if (!spec.needs.instructions.empty()) return "needs " + join(spec.needs.instructions) + ", which this library does not look for";
    for (const auto& [package, least] : spec.needs.packages) {
        std::string version = package == "onnxruntime" ? ort_version().substr(12) : "";
        bool fits = spec.needs.exactly ? numbers_of(version) == numbers_of(least) : numbers_of(version) >= numbers_of(least);
        if (!fits) return "needs " + package + " " + least + ", and here is " + (version.empty() ? "none" : version);
    }
    const Range& sides = spec.profile.side_px;
    if (side && (*side < sides.least || *side > sides.most))
        return "takes tiles of " + std::to_string(sides.least) + " to " + std::to_string(sides.most) + " px, and these have " + std::to_string(*side);
    return "";
}

// The most accurate engine of each component that fits, or that the caller names.
void choose(Opened& all, const std::optional<std::string>& wish) {
    const Bundle& bundle = all.bundle;
    Named<std::int64_t> sides;
    for (const auto& p : bundle.program.passes)
        if (p.tiles)
            for (const auto& placed : p.calls()) sides[placed.call->run] = p.tiles->px;
    auto meets = [&](const EngineSpec& spec) { return *wish == spec.name || *wish == spec.precision || *wish == spec.backend; };
    bool known = !wish;
    std::set<std::string> names, reasons;
    Strings lacking;
    for (const auto& component : bundle.program.components()) {
        const auto& engines = bundle.manifest.components.at(component).engines;
        bool asked = wish && std::any_of(engines.begin(), engines.end(), meets);
        known = known || asked;
        const EngineSpec*& best = all.specs[component];
        auto rank = [](const EngineSpec& spec) {
            return std::pair(std::find(PRECISIONS.begin(), PRECISIONS.end(), spec.precision) - PRECISIONS.begin(), spec.name);
        };
        for (const auto& spec : engines) {
            names.insert(spec.name);
            auto side = sides.find(component);
            std::string reason = misfit(spec, side == sides.end() ? std::nullopt : std::optional(side->second));
            if (!reason.empty()) reasons.insert(spec.name + " " + reason);
            if (reason.empty() && (!asked || meets(spec)) && (!best || rank(spec) < rank(*best))) best = &spec;
        }
        if (!best) lacking.push_back(component);
    }
    if (!known) throw Error(usage, "engine=" + repr(*wish) + " is none of this bundle's engines: " + join(listed(names)));
    if (!lacking.empty()) throw Error(environment, "no engine of " + join(lacking) + " can run here: " + join(listed(reasons), "; "));
}

// The batch that the caller and the engines allow, and no tiles larger than the engines take.
void fit_program(Opened& all, std::int64_t batch) {
    std::int64_t most = INT64_MAX, side = INT64_MAX;
    for (const auto& [name, spec] : all.specs) {
        most = std::min(most, spec->profile.batch.most);
        side = std::min(side, spec->profile.side_px.most);
    }
    if (batch < 0 || batch > most) throw Error(usage, "batch=" + std::to_string(batch) + " is not a whole number from 1 to " + std::to_string(most));
    bool above = false;
    for (const auto& p : all.bundle.program.passes) above = above || (p.tiles && p.tiles->batch > most);
    for (auto& p : all.bundle.program.passes) {
        if (!p.tiles) continue;
        auto& whole = p.tiles->whole_up_to_px;
        if (whole && std::max((*whole)[0], (*whole)[1]) > side) whole.reset();
        if (batch) {
            p.tiles->batch = batch;
        } else if (above) {
            p.tiles->batch = most;
        }
    }
}

std::optional<std::string> text_of(const char* text) { return text && *text ? std::optional<std::string>(text) : std::nullopt; }

std::shared_ptr<Opened> open(const char* path, const tw_params& params) {
    if (!path) throw Error(usage, "the path is NULL; give the folder of a bundle");
    if (params.threads < 0 || params.threads > 1024) throw Error(usage, "threads=" + std::to_string(params.threads) + " is not a whole number from 0 to 1024");
    auto all = std::make_shared<Opened>();
    all->bundle = read_bundle(path, text_of(params.expect));
    all->options.threads = params.threads;
    all->options.low_memory = params.low_memory != 0;
    if (auto native = text_of(params.native_library)) all->options.native = *native;
    if (auto folder = text_of(params.weights_dir)) all->weights_dir = *folder;
    choose(*all, text_of(params.engine));
    fit_program(*all, params.batch);
    for (const auto& [name, component] : all->bundle.manifest.components) all->signatures[name] = {component.inputs, component.outputs};
    if (all->bundle.manifest.constants) all->constants = read_tensors(all->bundle.root / *all->bundle.manifest.constants);
    for (const auto& [name, argument] : arguments_of(all->bundle.program)) all->arguments.emplace_back(name, argument);
    return all;
}

// ---- pictures

std::size_t stride_of(const tw_image& image) {
    std::size_t row = static_cast<std::size_t>(image.width) * image.format;
    if (image.stride && image.stride < row)
        throw Error(usage, "stride " + std::to_string(image.stride) + " is shorter than a row of " + std::to_string(row) + " bytes; give 0 or more");
    return image.stride ? image.stride : row;
}

void check_image(const tw_image& image) {
    if (!image.pixels) throw Error(usage, "the pixels are NULL; give their address");
    if (image.format < TW_GRAY8 || image.format > TW_RGBA8)
        throw Error(usage, "format " + std::to_string(image.format) + " is none of TW_GRAY8, TW_GRAYA8, TW_RGB8, TW_RGBA8");
    if (image.width < 1 || image.height < 1)
        throw Error(usage, "the image is " + std::to_string(image.width) + "x" + std::to_string(image.height) + " and has no pixels: pass one of at least 1x1");
    if (std::int64_t{image.width} * image.height > MOST_PIXELS)
        throw Error(usage, "the image is " + std::to_string(image.width) + "x" + std::to_string(image.height) + ", over the limit of " +
                               std::to_string(MOST_PIXELS) + " pixels; cut it into parts");
}

struct Picture {
    Pixels rgb;
    std::optional<Pixels> alpha;
    bool grey;
};

Picture split(const tw_image& image) {
    check_image(image);
    std::size_t stride = stride_of(image);
    bool grey = image.format < TW_RGB8, has_alpha = image.format % 2 == 0;
    Picture picture{{image.height, image.width, 3, {}}, std::nullopt, grey};
    picture.rgb.bytes.reserve(std::size_t{3} * image.width * image.height);
    if (has_alpha) picture.alpha = Pixels{image.height, image.width, 1, {}};
    for (std::int32_t y = 0; y < image.height; ++y) {
        const std::uint8_t* p = image.pixels + static_cast<std::size_t>(y) * stride;
        for (std::int32_t x = 0; x < image.width; ++x, p += image.format) {
            for (int c = 0; c < 3; ++c) picture.rgb.bytes.push_back(p[grey ? 0 : c]);
            if (has_alpha) picture.alpha->bytes.push_back(p[image.format - 1]);
        }
    }
    return picture;
}

void assemble(const Picture& picture, const Pixels& rgb, std::int64_t scale, const tw_image& out) {
    Pixels colour = picture.grey ? luma(rgb) : Pixels{}, alpha;
    if (picture.alpha) alpha = scale == 1 ? *picture.alpha : enlarged(*picture.alpha, scale);
    std::size_t stride = stride_of(out);
    for (std::int64_t y = 0; y < rgb.height; ++y) {
        std::uint8_t* to = out.pixels + static_cast<std::size_t>(y) * stride;
        for (std::int64_t i = y * rgb.width; i < (y + 1) * rgb.width; ++i) {
            if (picture.grey) {
                *to++ = colour.bytes[i];
            } else {
                for (int c = 0; c < 3; ++c) *to++ = rgb.bytes[3 * i + c];
            }
            if (picture.alpha) *to++ = alpha.bytes[i];
        }
    }
}

// ---- restoring

std::optional<std::int64_t> option(std::int32_t value, std::int32_t absent, const char* name) {
    if (value == absent) return std::nullopt;
    if (value < 0) throw Error(usage, std::string(name) + "=" + std::to_string(value) + " is not a whole number of at least 0");
    return value;
}

std::vector<Value> values_of(const tw_options& options) {
    std::vector<Value> values;
    if (options.value_count && !options.values) throw Error(usage, "the values are NULL; give their address, or a value_count of 0");
    for (std::size_t i = 0; i < options.value_count; ++i) {
        const tw_value& value = options.values[i];
        if (!value.name) throw Error(usage, "a value has no name");
        if (value.text) {
            values.push_back({value.name, std::string(value.text), {}});
            continue;
        }
        if (!value.data || !value.shape || !value.dtype || !value.rank)
            throw Error(usage, std::string(value.name) + " has neither a text nor an array; give text, or dtype, shape, rank and data");
        if (std::find(DTYPES.begin(), DTYPES.end(), value.dtype) == DTYPES.end())
            throw Error(usage, std::string(value.name) + ": dtype " + repr(std::string(value.dtype)) + " is not one of " + join(DTYPES));
        std::int64_t count = 1;
        for (std::size_t d = 0; d < value.rank; ++d) {
            if (value.shape[d] < 1 || count > (std::int64_t{1} << 40) / value.shape[d])
                throw Error(usage, std::string(value.name) + " has a size of " + std::to_string(value.shape[d]));
            count *= value.shape[d];
        }
        values.push_back({value.name, std::nullopt, tensor_of(value.dtype, Shape(value.shape, value.shape + value.rank), value.data)});
    }
    return values;
}

void require_tiles(const Opened& all, std::int64_t height, std::int64_t width, const Job& job) {
    for (const auto& p : all.bundle.program.passes) {
        TilePlan plan = plan_of(all.bundle.program, p, height, width, job.tile, job.overlap);
        if (!p.tiles) continue;
        for (const auto& placed : p.calls())
            for (auto side : {plan.tile_height, plan.tile_width}) {
                const EngineSpec& spec = *all.specs.at(placed.call->run);
                if (auto reason = misfit(spec, side); !reason.empty())
                    throw Error(usage, "engine " + spec.name + " of " + placed.call->run + " " + reason + "; use another tile or engine");
            }
    }
}

void restore(Opened& all, const tw_image* in, const tw_options& options, tw_image* out) {
    if (!in || !out) throw Error(usage, std::string(in ? "out" : "in") + " is NULL; give the address of an image");
    const Program& program = all.bundle.program;
    Job job;
    job.program = &program;
    job.signatures = &all.signatures;
    job.constants = &all.constants;
    job.engine = [&](const std::string& component) -> Engine& { return all.engine(component); };
    job.tile = option(options.tile, 0, "tile");
    job.overlap = option(options.overlap, -1, "overlap");
    job.steps = option(options.steps, 0, "steps");
    job.seed = options.seed;
    if (job.seed < 0 || job.seed > MOST_SEED)
        throw Error(usage, "seed=" + std::to_string(job.seed) + " is not a whole number from 0 to " + std::to_string(MOST_SEED));
    bool stepped = std::any_of(program.passes.begin(), program.passes.end(), [](const Pass& p) { return p.steps.has_value(); });
    if (job.steps && !stepped)
        throw Error(usage, "steps=" + std::to_string(*job.steps) + ": " + all.bundle.manifest.system + " has no steps; leave it out");
    std::int64_t scale = options.scale ? options.scale : program.scale;
    if (scale != program.scale && (!program.any_scale || scale < 1 || scale > 16))
        throw Error(usage, "scale=" + std::to_string(scale) + " does not work with this bundle; use " + (program.any_scale ? "1 to 16" : std::to_string(program.scale)));
    job.inputs = gather(all.bundle, values_of(options));
    Picture picture = split(*in);
    std::int64_t shortest = 1;
    for (const auto& [name, spec] : all.specs) shortest = std::max(shortest, spec->profile.side_px.least);
    Enlarged image{picture.rgb, scale, program.multiple_px, least_px(program, job.tile, shortest)};
    job.image = &image;
    Pixels rgb{picture.rgb.height * scale, picture.rgb.width * scale, 3, {}};
    if (std::max(rgb.height, rgb.width) > INT32_MAX) throw Error(usage, "the result has a side above 2147483647 px; cut the image into parts");
    bool own = out->pixels != nullptr;
    if (own && (out->width != rgb.width || out->height != rgb.height || out->format != in->format))
        throw Error(usage, "out is " + std::to_string(out->width) + "x" + std::to_string(out->height) + " of format " + std::to_string(out->format) +
                               "; the result is " + std::to_string(rgb.width) + "x" + std::to_string(rgb.height) + " of format " + std::to_string(in->format));
    if (own) stride_of(*out);
    require_tiles(all, image.height(), image.width(), job);
    rgb.bytes.resize(rgb.height * rgb.width * 3);
    if (options.on_progress)
        job.on_progress = [&](const std::string& pass, std::int64_t done, std::int64_t total) { told(options.on_progress, pass.c_str(), done, total, options.user); };
    if (options.is_cancelled)
        job.stopped = [&] {
            try {
                return options.is_cancelled(options.user) != 0;
            } catch (...) {
                throw Thrown();
            }
        };
    job.on_final = [&](std::int64_t top, std::int64_t left, const float* planes, std::int64_t height, std::int64_t width) {
        fill(rgb, top, left, planes, height, width);
        std::int64_t rows = std::min(height, rgb.height - top), columns = std::min(width, rgb.width - left);
        if (!options.on_part || rows < 1 || columns < 1) return;  // a part that is all padding has no pixels
        tw_part part{static_cast<std::int32_t>(top), static_cast<std::int32_t>(left),
                     {static_cast<std::int32_t>(columns), static_cast<std::int32_t>(rows), TW_RGB8, static_cast<std::size_t>(3 * rgb.width),
                      &rgb.bytes[3 * (top * rgb.width + left)]}};
        told<const tw_part*, void*>(options.on_part, &part, options.user);
    };
    walk(job);
    tw_image result = *out;
    std::unique_ptr<std::uint8_t[]> memory;
    if (!own) {
        std::size_t bytes = static_cast<std::size_t>(rgb.height * rgb.width) * in->format;
        memory.reset(new std::uint8_t[bytes]);
        result = {static_cast<std::int32_t>(rgb.width), static_cast<std::int32_t>(rgb.height), in->format, 0, memory.get()};
    }
    assemble(picture, rgb, scale, result);
    memory.release();
    *out = result;
}

const char* lent(const tw_bundle* handle, std::string (*text)(const Opened&)) noexcept {
    bool fine = guarded(handle, [&] { thread_text = text(*opened(handle)); }) == TW_OK;
    return fine ? thread_text.c_str() : nullptr;
}

}  // namespace
}  // namespace tw

tw_params tw_default_params(void) { return {sizeof(tw_params), 0, 0, 0, nullptr, nullptr, nullptr, nullptr}; }

tw_options tw_default_options(void) { return {sizeof(tw_options), 0, 0, -1, 0, 0, nullptr, 0, nullptr, nullptr, nullptr, nullptr}; }

tw_bundle* tw_open(const char* path, const tw_params* params) {
    static std::uintptr_t number = 0;
    tw_bundle* handle = nullptr;
    tw::guarded(nullptr, [&] {
        auto all = tw::open(path, tw::complete(params, tw_default_params(), "params", "tw_default_params"));
        std::lock_guard guard(tw::lock_of_handles);
        tw::handles()[++number] = std::move(all);
        handle = reinterpret_cast<tw_bundle*>(number);
    });
    return handle;
}

void tw_close(tw_bundle* bundle) {
    std::shared_ptr<tw::Opened> last;  // freed after the lock
    std::lock_guard guard(tw::lock_of_handles);
    auto entry = tw::handles().find(reinterpret_cast<std::uintptr_t>(bundle));
    if (entry == tw::handles().end()) return;
    last = std::move(entry->second);
    tw::handles().erase(entry);
}

void tw_image_free(tw_image* image) {
    if (!image) return;
    delete[] image->pixels;
    *image = tw_image{};
}

std::int32_t tw_restore(tw_bundle* bundle, const tw_image* in, const tw_options* options, tw_image* out) {
    return tw::guarded(bundle, [&] {
        auto all = tw::opened(bundle);
        std::lock_guard guard(all->running);
        tw::restore(*all, in, tw::complete(options, tw_default_options(), "options", "tw_default_options"), out);
    });
}

const char* tw_system(tw_bundle* bundle) {
    return tw::lent(bundle, [](const tw::Opened& all) { return all.bundle.manifest.system; });
}

const char* tw_digest(tw_bundle* bundle) {
    return tw::lent(bundle, [](const tw::Opened& all) { return all.bundle.digest; });
}

std::int32_t tw_scale(tw_bundle* bundle) {
    std::int32_t scale = 0;
    tw::guarded(bundle, [&] { scale = static_cast<std::int32_t>(tw::opened(bundle)->bundle.program.scale); });
    return scale;
}

std::size_t tw_argument_count(tw_bundle* bundle) {
    std::size_t count = 0;
    tw::guarded(bundle, [&] { count = tw::opened(bundle)->arguments.size(); });
    return count;
}

std::int32_t tw_argument_at(tw_bundle* bundle, std::size_t index, tw_argument* argument) {
    return tw::guarded(bundle, [&] {
        auto all = tw::opened(bundle);
        if (!argument) throw tw::Error(tw::usage, "the argument is NULL; give its address");
        if (index >= all->arguments.size()) throw tw::Error(tw::usage, "index " + std::to_string(index) + ": the bundle has " + std::to_string(all->arguments.size()) + " arguments");
        const auto& [name, it] = all->arguments[index];
        tw::thread_texts = {name, it.kind, it.takes(), it.help};
        const auto& texts = tw::thread_texts;
        *argument = {texts[0].c_str(), texts[1].c_str(), texts[2].c_str(), texts[3].c_str(), it.needed ? 1 : 0};
    });
}

const char* tw_last_error(tw_bundle* bundle) {
    try {
        tw::thread_text = tw::thread_error;
        if (bundle) {
            auto all = tw::opened(bundle);
            std::lock_guard telling(all->telling);
            tw::thread_text = all->error;
        }
    } catch (const tw::Error& error) {
        tw::thread_text = error.what();
    } catch (...) {
        return "too little memory for a message";
    }
    return tw::thread_text.c_str();
}

std::int32_t tw_last_status(void) { return tw::thread_status; }

const char* tw_version(void) {
    tw::guarded(nullptr, [] { tw::thread_text = TW_VERSION ", " + tw::ort_version(); });
    return tw::thread_text.c_str();
}
