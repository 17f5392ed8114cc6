// Packages of AOTInductor: machine code that PyTorch made of a network. As runtime/engines/aoti.py.
//
// A library of its own, because PyTorch's takes long to load: backends.cpp loads it when a bundle needs it. A package holds no
// weights. It reads them where they lie, mapped from their files.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <algorithm>
#include <cstring>

#include "engine.hpp"
#include "explained.hpp"
#include "machine.hpp"

namespace tw {
namespace {

using torch::inductor::AOTIModelPackageLoader;
using Constants = std::unordered_map<std::string, at::Tensor>;

const Named<at::ScalarType> TYPES = {{"float32", at::kFloat}, {"float64", at::kDouble}, {"float16", at::kHalf}, {"bfloat16", at::kBFloat16},
                                     {"int64", at::kLong},    {"int32", at::kInt},      {"int16", at::kShort},  {"int8", at::kChar},
                                     {"uint8", at::kByte},    {"bool", at::kBool}};
const char* const ANEW = "compile it again with 'tilewright export compile BUNDLE --target aoti'";

const std::vector<Reason> REASONS = {
    {{"out of memory", "can't allocate", "bad_alloc", "not enough memory"}, resource, MEMORY},
    {{"no space left", "write failed", "failed to write"}, resource, "free some of the disk behind TMPDIR, where PyTorch unpacks packages"},
    {{"undefined symbol", "cannot open shared object", "no kernel image", "failed to dlopen"}, environment, ANEW},
    {{"zip", "archive", "central directory", "failed to find", "failed to load", "not found"}, damaged, DAMAGED}};

Error explained(const Path& package, const std::string& what, const std::exception& error) {
    auto* ours = dynamic_cast<const c10::Error*>(&error);
    return explained(REASONS, package, "torch " TW_AOTI, what, ours ? ours->what_without_backtrace() : error.what());
}

// A size of an input: a number, or the units of a free size. See `sizes_of` in export/graph/trace.py.
struct Extent {
    std::string name;  // empty: a number
    std::int64_t unit = 0, most = 0;

    // Whether a size is as expected, and equals those of the same name.
    bool fits(std::int64_t size, Named<std::int64_t>& units) const {
        if (name.empty()) return size == unit;
        std::int64_t count = size / unit;
        return size % unit == 0 && count >= 1 && count <= most && units.emplace(name, count).first->second == count;
    }
};

struct Expected {
    std::string name, dtype;
    std::vector<Extent> extents;

    bool has_rows() const { return !extents.empty() && extents[0].name == "batch"; }
};

// What a package says of itself.
struct Told {
    std::vector<Expected> inputs;  // in the order in which the package takes them
    Strings outputs;

    Told(const std::unordered_map<std::string, std::string>& metadata, const std::string& where) {
        auto document = [&](const char* key) {
            auto entry = metadata.find(key);
            if (entry == metadata.end()) throw Invalid(key);
            return parse_json(entry->second, where);
        };
        try {
            Json sizes = document("sizes"), types = document("types");
            for (const auto& [name, size] : sizes.members) {
                const Json* dtype = types.find(name);
                if (!dtype || !TYPES.count(dtype->text)) throw Invalid("types");
                Expected input{name, dtype->text, {}};
                for (const auto& each : size.items) input.extents.push_back(extent(each));
                inputs.push_back(std::move(input));
            }
            for (const auto& name : document("outputs").items) outputs.push_back(name.text);
        } catch (const Invalid& error) {
            throw Error(damaged, where + ": the package does not tell its " + error.what() + "; " + ANEW);
        }
    }

    static Extent extent(const Json& size) {
        if (size.kind == Json::integer) return {"", size.whole, size.whole};
        if (size.items.size() != 3 || size.items[1].whole < 1) throw Invalid("sizes");
        return {size.items[0].text, size.items[1].whole, size.items[2].whole};
    }
};

// A tensor over the numbers of another one, which stay as long as it needs them. PyTorch takes them as mutable and does not change them.
at::Tensor view_of(const Tensor& tensor) {
    return at::from_blob(const_cast<void*>(tensor.data.get()), tensor.shape, [data = tensor.data](void*) {}, TYPES.at(tensor.dtype));
}

// A tensor over the bytes in a file, or a copy if their place is no multiple of their width.
at::Tensor mapped(const std::shared_ptr<Mapped>& file, const Reference& reference) {
    const unsigned char* bytes = file->data() + reference.offset;
    bool aligned = reinterpret_cast<std::uintptr_t>(bytes) % width_of(reference.dtype) == 0;
    if (aligned && reference.length) return view_of({reference.dtype, reference.shape, std::shared_ptr<const void>(file, bytes)});
    at::Tensor copy = at::empty(reference.shape, TYPES.at(reference.dtype));
    if (reference.length) std::memcpy(copy.data_ptr(), bytes, static_cast<std::size_t>(reference.length));
    return copy;
}

class AotiEngine : public Engine {
   public:
    AotiEngine(std::unique_ptr<AOTIModelPackageLoader> loader, Constants weights, Told told, Path package, int threads)
        : weights_(std::move(weights)), loader_(std::move(loader)), told_(std::move(told)), package_(std::move(package)), threads_(threads) {}

    // As many calls may run at the same time as it was opened for; others wait.
    Named<Tensor> run(const Named<Tensor>& inputs, const Strings& outputs) override {
        check(inputs, outputs);
        try {
            if (at::get_num_threads() != threads_) at::set_num_threads(threads_);  // each thread that calls has a number of its own
            auto results = loader_->boxed_run(feed(inputs));
            Named<Tensor> tensors;
            for (std::size_t i = 0; i < results.size() && i < told_.outputs.size(); ++i) {
                const std::string& name = told_.outputs[i];
                if (std::find(outputs.begin(), outputs.end(), name) == outputs.end()) continue;
                auto result = std::make_shared<at::Tensor>(results[i].contiguous());
                auto type = std::find_if(TYPES.begin(), TYPES.end(), [&](const auto& entry) { return entry.second == result->scalar_type(); });
                if (type == TYPES.end()) throw Error(damaged, package_.string() + ": output " + repr(name) + " has a type that no program holds");
                tensors[name] = {type->first, result->sizes().vec(), std::shared_ptr<const void>(result, result->const_data_ptr())};
            }
            for (const auto& name : outputs)
                if (!tensors.count(name)) throw Error(damaged, package_.string() + ": gave no output " + repr(name) + "; " + OTHER_GRAPH);
            return tensors;
        } catch (const Error&) {
            throw;
        } catch (const std::exception& error) {
            throw explained(package_, "failed", error);
        }
    }

   private:
    Constants weights_;  // which the loader reads
    std::unique_ptr<AOTIModelPackageLoader> loader_;
    Told told_;
    Path package_;
    int threads_;

    std::vector<at::Tensor> feed(const Named<Tensor>& inputs) const {
        std::vector<at::Tensor> tensors;
        std::int64_t rows = 1;
        for (const auto& input : told_.inputs) {
            tensors.push_back(view_of(inputs.at(input.name)));
            if (input.has_rows()) rows = std::max(rows, tensors.back().size(0));
        }
        for (std::size_t i = 0; i < tensors.size(); ++i) {
            if (!told_.inputs[i].has_rows() || tensors[i].size(0) == rows) continue;  // else one row for all tiles
            std::vector<std::int64_t> shape = tensors[i].sizes().vec();
            shape[0] = rows;
            tensors[i] = tensors[i].expand(shape).contiguous();
        }
        return tensors;
    }

    // Refuses inputs that the package does not take. Machine code does not check, and would read other memory.
    void check(const Named<Tensor>& inputs, const Strings& outputs) const {
        auto refuse = [&](const std::string& what) { throw Error(damaged, package_.string() + ": " + what + "; " + OTHER_GRAPH); };
        std::vector<const Expected*> order;
        for (const auto& input : told_.inputs) order.push_back(&input);
        for (const auto& [name, tensor] : inputs)
            if (std::none_of(order.begin(), order.end(), [&, &name = name](const Expected* input) { return input->name == name; })) refuse("has no input " + repr(name));
        for (const auto& name : outputs)
            if (std::find(told_.outputs.begin(), told_.outputs.end(), name) == told_.outputs.end()) refuse("has no output " + repr(name));
        for (const Expected* input : order)
            if (!inputs.count(input->name)) refuse("input " + repr(input->name) + " is missing");
        auto rows_of = [&](const Expected* input) {
            const Shape& shape = inputs.at(input->name).shape;
            return shape.empty() ? 0 : shape[0];
        };
        std::stable_sort(order.begin(), order.end(), [&](const Expected* a, const Expected* b) { return rows_of(a) > rows_of(b); });
        Named<std::int64_t> units;  // free size -> its units
        for (const Expected* input : order) {
            const Tensor& tensor = inputs.at(input->name);
            if (tensor.dtype != input->dtype) refuse("input " + repr(input->name) + " is " + tensor.dtype + ", not " + input->dtype);
            Shape whole = tensor.shape;
            if (input->has_rows() && rows_of(input) == 1) whole[0] = units.count("batch") ? units.at("batch") : 1;
            bool fits = whole.size() == input->extents.size();
            for (std::size_t i = 0; fits && i < whole.size(); ++i) fits = input->extents[i].fits(whole[i], units);
            if (fits) continue;
            throw Error(usage, package_.string() + ": input " + repr(input->name) + " has sizes " + repr(tensor.shape) + "; " + OTHER_SIZE);
        }
    }
};

// The constants that the network computed.
Constants constants_of(const Path& path) {
    Constants constants;
    auto file = std::make_shared<Mapped>(path);
    for (const auto& [name, stored] : safetensors_header(file->data(), file->size(), path.string())) {
        Reference reference{path.filename().string(), stored.spec.dtype, {}, stored.start, stored.length, ""};
        for (const auto& dim : stored.spec.shape) reference.shape.push_back(dim.size);
        constants[name] = mapped(file, reference);
    }
    return constants;
}

std::unique_ptr<Engine> open(const EngineFiles& files, const EngineOptions& options) {
    const Path& package = files.graph();
    try {
        auto loader = std::make_unique<AOTIModelPackageLoader>(package.string(), "model", false, static_cast<std::size_t>(options.calls), -1);
        Told told(loader->get_metadata(), package.string());
        Constants constants = constants_of(files.paths.at(1));
        Named<std::shared_ptr<Mapped>> maps;
        auto names = loader->get_constant_fqns();
        std::sort(names.begin(), names.end());
        for (const auto& name : names) {
            if (constants.count(name)) continue;
            auto reference = files.references.find(name);
            if (reference == files.references.end())
                throw Error(damaged, package.string() + ": reads weight " + repr(name) + ", which the bundle does not list; " + ANEW);
            const Path& file = files.weights.at(reference->second.location());
            auto& map = maps[file.string()];
            if (!map) map = std::make_shared<Mapped>(file);
            constants[name] = mapped(map, reference->second);
        }
        loader->load_constants(constants, false, true, true);  // all of them, and they stay where they are
        int threads = options.threads ? options.threads : static_cast<int>(usable_cores());
        return std::make_unique<AotiEngine>(std::move(loader), std::move(constants), std::move(told), package, threads);
    } catch (const Error&) {
        throw;
    } catch (const std::exception& error) {
        throw explained(package, "refuses the package", error);
    }
}

}  // namespace
}  // namespace tw

// The only function of this library that backends.cpp looks for.
extern "C" __attribute__((visibility("default"))) tw::Engine* tw_open_aoti(const tw::EngineFiles& files, const tw::EngineOptions& options) {
    return tw::open(files, options).release();
}
