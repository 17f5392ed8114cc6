// The functions of tilewright.h.
#include "tilewright.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <mutex>
#include <new>
#include <thread>

#include "backends.hpp"
#include "restorer.hpp"

#ifndef TW_VERSION
#define TW_VERSION "0"
#endif

namespace tw {
namespace {

constexpr double LONGEST_S = 1e8;  // three years

// A caller's exception, which must not pass through C.
struct Thrown {};

struct Opened {
    Restorer restorer;
    std::mutex running;
    std::atomic<std::thread::id> runner{};  // the thread whose call runs
    std::mutex telling;
    std::string error;

    Opened(const char* path, const OpenOptions& options) : restorer(path, options) {}
};

struct Runner {
    std::atomic<std::thread::id>& runner;
    explicit Runner(std::atomic<std::thread::id>& its_runner) : runner(its_runner) { runner = std::this_thread::get_id(); }
    ~Runner() { runner = std::thread::id(); }
};

// Handles are numbers, so a closed one never meets another bundle.
std::mutex lock_of_handles;
std::map<std::uintptr_t, std::shared_ptr<Opened>>& handles() {
    static auto* all = new std::map<std::uintptr_t, std::shared_ptr<Opened>>;  // never freed, so a call at the end of the process finds it
    return *all;
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

template <class Result, class... Types>
Result told(Result (*callback)(Types...), Types... values) {
    try {
        return callback(values...);
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

// The defaults for a caller whose struct may be shorter or longer than ours.
template <class Struct>
void put_defaults(Struct* given, Struct& standard, std::size_t size) {
    if (!given || size < sizeof(std::size_t)) return;
    standard.size = size;
    std::memset(static_cast<void*>(given), 0, size);
    std::memcpy(given, &standard, std::min(size, sizeof(Struct)));
}

std::optional<std::string> text_of(const char* text) { return text ? std::optional<std::string>(text) : std::nullopt; }

std::shared_ptr<Opened> open(const char* path, const tw_params& params) {
    if (!path) throw Error(usage, "the path is NULL; give the folder of a bundle");
    if (params.threads < 0 || params.threads > 1024) throw Error(usage, "threads=" + std::to_string(params.threads) + " is not a whole number from 0 to 1024");
    if (params.memory_limit < 0) throw Error(usage, "memory_limit=" + std::to_string(params.memory_limit) + " is not a whole number of at least 0");
    if (!(params.deadline_s >= 0 && params.deadline_s <= LONGEST_S))
        throw Error(usage, "deadline_s=" + repr(params.deadline_s) + " is not a number of seconds from 0 to 100000000");
    OpenOptions options;
    options.engines.threads = params.threads;
    options.engines.low_memory = params.low_memory != 0;
    options.engines.native = native_library();
    if (params.native_library) options.engines.native = *params.native_library ? std::optional<Path>(params.native_library) : std::nullopt;
    if (auto folder = text_of(params.weights_dir)) options.weights_dir = *folder;
    options.engine = text_of(params.engine);
    options.expect = text_of(params.expect);
    options.batch = params.batch;
    options.fresh = params.fresh != 0;
    if (auto devices = text_of(params.devices)) options.devices = *devices;
    if (params.memory_limit) options.memory_limit = params.memory_limit;
    options.deadline_s = params.deadline_s;
    return std::make_shared<Opened>(path, options);
}

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

RestoreOptions options_of(const tw_options& options, int bits) {
    RestoreOptions its;
    its.seed = options.seed;
    its.tile = option(options.tile, 0, "tile");
    its.overlap = option(options.overlap, -1, "overlap");
    its.steps = option(options.steps, 0, "steps");
    its.scale = option(options.scale, 0, "scale");
    if (options.bits && options.bits != 8 && options.bits != 16) throw Error(usage, "bits=" + std::to_string(options.bits) + " is no depth of a channel; use 8 or 16");
    its.bits = options.bits ? options.bits : bits;
    if (options.color) its.color = options.color;
    its.jitter = options.jitter != 0;
    its.values = values_of(options);
    return its;
}

Watch watch_of(const tw_options& options) {
    Watch watch;
    if (options.on_progress)
        watch.on_progress = [&](const std::string& pass, std::int64_t done, std::int64_t total) { told(options.on_progress, pass.c_str(), done, total, options.user); };
    if (options.is_cancelled) watch.is_cancelled = [&] { return told(options.is_cancelled, options.user) != 0; };
    if (options.on_note) watch.on_note = [&](const std::string& note) { told(options.on_note, note.c_str(), options.user); };
    if (options.on_part)
        watch.on_part = [&](const Pixels& rgb, const Tile& place) {
            std::int64_t first = 3 * (place.top * rgb.width + place.left);
            bool words = rgb.bits() == 16;
            const void* pixels = words ? static_cast<const void*>(&rgb.words[first]) : &rgb.bytes[first];
            tw_part part{static_cast<std::int32_t>(place.top), static_cast<std::int32_t>(place.left),
                         {static_cast<std::int32_t>(place.width), static_cast<std::int32_t>(place.height), words ? TW_RGB16 : TW_RGB8,
                          static_cast<std::size_t>(3 * rgb.width) * rgb.bits() / 8, const_cast<void*>(pixels)}};
            told<void, const tw_part*, void*>(options.on_part, &part, options.user);
        };
    return watch;
}

void restore(Restorer& restorer, const tw_image* in, const tw_options& options, tw_image* out) {
    if (!in || !out) throw Error(usage, std::string(in ? "out" : "in") + " is NULL; give the address of an image");
    RestoreOptions its = options_of(options, bits_of(*in));
    Picture picture = split(*in, its.bits);
    std::int64_t scale = restorer.scale_of(its), width = picture.rgb.width * scale, height = picture.rgb.height * scale;
    if (std::max(height, width) > INT32_MAX) throw Error(usage, "the result has a side above 2147483647 px; cut the image into parts");
    auto format = static_cast<tw_format>(channels_of(*in) + (its.bits == 16 ? 16 : 0));
    bool own = out->pixels != nullptr;
    if (own && (out->width != width || out->height != height || out->format != format))
        throw Error(usage, "out is " + std::to_string(out->width) + "x" + std::to_string(out->height) + " of format " + std::to_string(out->format) +
                               "; the result is " + std::to_string(width) + "x" + std::to_string(height) + " of format " + std::to_string(format));
    if (own) stride_of(*out);
    Pixels rgb = restorer.restore(picture, its, watch_of(options));
    tw_image result = *out;
    std::unique_ptr<std::uint8_t[]> memory;
    if (!own) {
        result = {static_cast<std::int32_t>(width), static_cast<std::int32_t>(height), format, 0, nullptr};
        memory.reset(new std::uint8_t[stride_of(result) * static_cast<std::size_t>(height)]);
        result.pixels = memory.get();
    }
    assemble(picture, rgb, scale, result);
    memory.release();
    *out = result;
}

// Component, name and reason of every engine; no reason: it was chosen.
std::vector<Strings> engines_of(const Opened& all) {
    std::vector<Strings> engines;
    for (const auto& [component, choice] : all.restorer.choices()) {
        engines.push_back({component, choice.spec->name, ""});
        for (const auto& reasons : {choice.others, choice.misfits})
            for (const auto& [name, reason] : reasons) engines.push_back({component, name, reason});
    }
    return engines;
}

const char* lent(const tw_bundle* handle, std::string (*text)(const Opened&)) noexcept {
    bool fine = guarded(handle, [&] { thread_text = text(*opened(handle)); }) == TW_OK;
    return fine ? thread_text.c_str() : nullptr;
}

}  // namespace
}  // namespace tw

void tw_fill_params(tw_params* params, size_t size) {
    tw_params standard{};
    tw::put_defaults(params, standard, size);
}

void tw_fill_options(tw_options* options, size_t size) {
    tw_options standard{};
    standard.overlap = -1;
    tw::put_defaults(options, standard, size);
}

tw_bundle* tw_open(const char* path, const tw_params* params) {
    static std::uintptr_t number = 0;
    tw_bundle* handle = nullptr;
    tw::guarded(nullptr, [&] {
        auto all = tw::open(path, tw::complete(params, tw_default_params(), "params", "tw_default_params"));
        std::lock_guard guard(tw::lock_of_handles);
        tw::handles()[++number] = std::move(all);
        handle = reinterpret_cast<tw_bundle*>(number);  // NOLINT(performance-no-int-to-ptr): a number, never an address
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
    delete[] static_cast<std::uint8_t*>(image->pixels);
    *image = tw_image{};
}

std::int32_t tw_restore(tw_bundle* bundle, const tw_image* in, const tw_options* options, tw_image* out) {
    return tw::guarded(bundle, [&] {
        auto all = tw::opened(bundle);
        if (all->runner == std::this_thread::get_id()) throw tw::Error(tw::usage, "a callback restores with its own bundle; open the bundle once more for it");
        std::lock_guard guard(all->running);
        tw::Runner runner(all->runner);
        tw::restore(all->restorer, in, tw::complete(options, tw_default_options(), "options", "tw_default_options"), out);
    });
}

const char* tw_system(tw_bundle* bundle) {
    return tw::lent(bundle, [](const tw::Opened& all) { return all.restorer.bundle().manifest.system; });
}

const char* tw_digest(tw_bundle* bundle) {
    return tw::lent(bundle, [](const tw::Opened& all) { return all.restorer.bundle().digest; });
}

std::int32_t tw_scale(tw_bundle* bundle) {
    std::int32_t scale = 0;
    tw::guarded(bundle, [&] { scale = static_cast<std::int32_t>(tw::opened(bundle)->restorer.bundle().program.scale); });
    return scale;
}

std::size_t tw_argument_count(tw_bundle* bundle) {
    std::size_t count = 0;
    tw::guarded(bundle, [&] { count = tw::opened(bundle)->restorer.arguments().size(); });
    return count;
}

std::int32_t tw_argument_at(tw_bundle* bundle, std::size_t index, tw_argument* argument) {
    return tw::guarded(bundle, [&] {
        auto all = tw::opened(bundle);
        if (!argument) throw tw::Error(tw::usage, "the argument is NULL; give its address");
        if (index >= all->restorer.arguments().size()) throw tw::Error(tw::usage, "index " + std::to_string(index) + ": the bundle has " + std::to_string(all->restorer.arguments().size()) + " arguments");
        const auto& [name, it] = all->restorer.arguments()[index];
        tw::thread_texts = {name, it.kind, it.takes(), it.help};
        const auto& texts = tw::thread_texts;
        *argument = {texts[0].c_str(), texts[1].c_str(), texts[2].c_str(), texts[3].c_str(), it.needed ? 1 : 0};
    });
}

const char* tw_devices(tw_bundle* bundle) {
    return tw::lent(bundle, [](const tw::Opened& all) { return all.restorer.devices(); });
}

std::size_t tw_engine_count(tw_bundle* bundle) {
    std::size_t count = 0;
    tw::guarded(bundle, [&] { count = tw::engines_of(*tw::opened(bundle)).size(); });
    return count;
}

std::int32_t tw_engine_at(tw_bundle* bundle, std::size_t index, tw_engine* engine) {
    return tw::guarded(bundle, [&] {
        auto all = tw::opened(bundle);
        if (!engine) throw tw::Error(tw::usage, "the engine is NULL; give its address");
        auto engines = tw::engines_of(*all);
        if (index >= engines.size()) throw tw::Error(tw::usage, "index " + std::to_string(index) + ": the bundle has " + std::to_string(engines.size()) + " engines");
        tw::thread_texts = engines[index];
        const auto& texts = tw::thread_texts;
        *engine = {texts[0].c_str(), texts[1].c_str(), texts[2].c_str()};
    });
}

std::int32_t tw_needed_bytes(tw_bundle* bundle, std::int32_t width, std::int32_t height, const tw_options* options, std::int64_t* bytes) {
    return tw::guarded(bundle, [&] {
        auto all = tw::opened(bundle);
        if (!bytes) throw tw::Error(tw::usage, "bytes is NULL; give its address");
        if (width < 1 || height < 1) throw tw::Error(tw::usage, std::to_string(width) + "x" + std::to_string(height) + " is no image size; use 1x1 or more");
        auto its = tw::options_of(tw::complete(options, tw_default_options(), "options", "tw_default_options"), 8);
        *bytes = all->restorer.estimate(width, height, its).needed_bytes;
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
    tw::guarded(nullptr, [] { tw::thread_text = TW_VERSION ", " + tw::backend_versions(); });
    return tw::thread_text.c_str();
}
