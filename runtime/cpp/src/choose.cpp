#include "choose.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "backends.hpp"
#include "gpu.hpp"
#include "machine.hpp"
#include "trust.hpp"

namespace tw {
namespace {

constexpr double PSNR_GATE = 40.0;
const Strings BACKENDS = {"tensorrt", "cuda", "aoti", "ort", "openvino"};  // in the order in which they come first

// The numbers of a version without the zeros at its end.
std::vector<std::int64_t> release(const std::string& version) {
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

bool meets(const EngineSpec& spec, const std::optional<std::string>& wish) {
    return !wish || *wish == spec.name || *wish == spec.precision || *wish == spec.backend;
}

// The reason why an engine cannot run on a machine, or an empty text.
std::string misfit(const EngineSpec& spec, const Machine& machine) {
    if (spec.device != machine.device) return "runs on " + spec.device + ", and the device that was asked for is of the kind " + machine.device;
    auto backend = machine.backends.find(spec.backend);
    if (backend == machine.backends.end())
        return spec.backend == "cuda" ? "needs ONNX Runtime for CUDA, and the one that is linked has no CUDA"
                                      : "has the backend " + repr(spec.backend) + ", which this library was built without";
    Strings lacking;
    for (const auto& name : spec.needs.instructions)
        if (!machine.instructions.count(name)) lacking.push_back(name);
    if (!lacking.empty()) return "needs " + join(lacking) + ", which this CPU lacks";
    if (machine.cores < spec.needs.cores)
        return "needs " + std::to_string(spec.needs.cores) + " cores, and this process may use " + std::to_string(machine.cores);
    if (const auto& least = spec.needs.compute_capability) {
        const auto& has = machine.compute_capability;
        auto text = [](const std::array<std::int64_t, 2>& numbers) { return std::to_string(numbers[0]) + "." + std::to_string(numbers[1]); };
        if (!has || (spec.needs.exactly ? *has != *least : *has < *least))
            return "needs compute capability " + text(*least) + ", this GPU's is " + (has ? text(*has) : "unknown");
    }
    for (const auto& [package, least] : spec.needs.packages) {
        const auto& [name, version] = backend->second;
        if (package != name) return "needs " + package + " " + least + ", which this library was built without";
        if (spec.needs.exactly && release(version) != release(least)) return "was compiled with " + package + " " + least + ", and " + version + " is linked";
        if (release(version) < release(least)) return "needs " + package + " " + least + " or later, " + version + " is linked";
    }
    return "";
}

bool accurate(const EngineSpec& spec, const Named<Measured>& measured) {
    if (spec.precision == "float32") return true;
    auto entry = measured.find(spec.name);
    return entry != measured.end() && entry->second.psnr_db && *entry->second.psnr_db >= PSNR_GATE;
}

// The place of an engine in the order.
auto rank(const EngineSpec& spec, const Named<Measured>& measured) {
    auto entry = measured.find(spec.name);
    double seconds = entry == measured.end() ? INFINITY : entry->second.seconds_per_megapixel;
    auto place = [](const Strings& order, const std::string& name) { return std::find(order.begin(), order.end(), name) - order.begin(); };
    return std::tuple(!accurate(spec, measured), seconds, place(PRECISIONS, spec.precision), place(BACKENDS, spec.backend), spec.name);
}

// The reason why an engine comes after the best one.
std::string why(const EngineSpec& best, const EngineSpec& spec, const Named<Measured>& measured) {
    auto one = measured.find(best.name), other = measured.find(spec.name);
    bool one_known = one != measured.end(), other_known = other != measured.end();
    char text[64];
    if (accurate(best, measured) && !accurate(spec, measured)) {
        bool told = other_known && other->second.psnr_db;
        std::snprintf(text, sizeof text, "%.1f dB, the gate is %.0f dB", told ? *other->second.psnr_db : 0, PSNR_GATE);
        return best.name + " is more accurate (" + (told ? text : "not measured") + "); the engine " + spec.name + " can be asked for";
    }
    if (one_known && other_known && one->second.seconds_per_megapixel < other->second.seconds_per_megapixel) {
        std::snprintf(text, sizeof text, "%.3g s a megapixel, this one %.3g", one->second.seconds_per_megapixel, other->second.seconds_per_megapixel);
        return best.name + " is faster: " + text;
    }
    if (one_known && !other_known) return best.name + " was measured, this one was not";
    return best.name + " comes first in the fixed order";
}

Choice choose_one(const Component& component, const Machine& machine, const std::optional<std::string>& wish, const Named<Measured>& measured,
                  std::optional<std::int64_t> side, const std::set<std::string>& strange) {
    Choice choice;
    std::vector<const EngineSpec*> fitting;
    for (const auto& spec : component.engines) {
        std::string reason = misfit(spec, machine);
        if (reason.empty() && side) reason = outside(spec, *side);
        bool wished = wish && (*wish == spec.name || *wish == spec.backend);
        if (reason.empty() && strange.count(spec.name) && !wished)
            reason = "is machine code that was not compiled here; if you trust its maker, ask for it: --engine " + spec.name;
        if (reason.empty()) {
            fitting.push_back(&spec);
        } else {
            choice.misfits[spec.name] = reason;
        }
    }
    std::sort(fitting.begin(), fitting.end(), [&](const EngineSpec* a, const EngineSpec* b) { return rank(*a, measured) < rank(*b, measured); });
    for (const EngineSpec* spec : fitting)
        if (!choice.spec && meets(*spec, wish)) choice.spec = spec;
    for (const EngineSpec* spec : fitting)
        if (spec != choice.spec) choice.others[spec->name] = choice.spec && meets(*spec, wish) ? why(*choice.spec, *spec, measured) : "is not the engine that was asked for, " + *wish;
    return choice;
}

const Json* of_kind(const Json* json, Json::Kind kind) { return json && json->kind == kind ? json : nullptr; }

std::optional<double> real(const Json* json) {
    if (!json || (json->kind != Json::number && json->kind != Json::integer)) return std::nullopt;
    return json->real;
}

}  // namespace

Machine this_machine(const std::string& device) {
    Machine machine{usable_cores(), instructions(), {}, processor(), device, device == "cuda" ? compute_capability() : std::nullopt};
    for (const auto& [name, backend] : backends()) machine.backends[name] = {backend.package, backend.version};
    return machine;
}

Named<Named<Measured>> measured_on(const Path& bundle, const std::string& processor) {
    Named<Named<Measured>> latest;
    try {
        Path path = bundle / "reports" / "measured.json";
        std::error_code error;
        if (!std::filesystem::is_regular_file(path, error)) return latest;
        Json document = parse_json(bytes_of(path), path.string());
        const Json* list = of_kind(document.find("measurements"), Json::list);
        std::vector<const Json*> here;
        if (!list) return latest;
        for (const auto& each : list->items)
            if (const Json* name = of_kind(each.find("processor"), Json::string); name && name->text == processor) here.push_back(&each);
        for (const Json* each : here) {
            const Json *threads = each->find("threads"), *last = here.back()->find("threads"), *components = of_kind(each->find("components"), Json::object);
            if (!threads || !last || threads->whole != last->whole || !components) continue;  // times with other threads do not compare
            for (const auto& [component, engines] : components->members)
                for (const auto& [engine, numbers] : engines.members)
                    if (auto seconds = real(numbers.find("seconds_per_megapixel"))) latest[component][engine] = {*seconds, real(numbers.find("psnr_db"))};
        }
    } catch (const Error&) {
        latest.clear();
    }
    return latest;
}

Named<Choice> choose(const Bundle& bundle, const Machine& machine, const std::optional<std::string>& wish, const Named<Named<Measured>>& measured) {
    Named<std::int64_t> sides;
    for (const auto& p : bundle.program.passes)
        if (p.tiles)
            for (const auto& placed : p.calls()) sides[placed.call->run] = p.tiles->px;
    std::set<std::string> names, precisions, kinds;
    bool known = false;
    Named<Choice> choices;
    Named<std::set<std::string>> strange = strangers(bundle.manifest);
    for (const auto& name : bundle.program.components()) {
        const Component& component = bundle.manifest.components.at(name);
        bool asked = false;
        for (const auto& spec : component.engines) {
            names.insert(spec.name), precisions.insert(spec.precision), kinds.insert(spec.backend);
            asked = asked || meets(spec, wish);
        }
        known = known || asked;
        auto side = sides.find(name);
        auto numbers = measured.find(name);
        choices[name] = choose_one(component, machine, asked ? wish : std::nullopt, numbers == measured.end() ? Named<Measured>{} : numbers->second,
                                   side == sides.end() ? std::nullopt : std::optional(side->second), strange[name]);
    }
    if (!known)
        throw Error(usage, "engine=" + repr(one_line(*wish)) + " is none of this bundle's engines: " + join(listed(names)) + "; their precisions: " +
                               join(listed(precisions)) + "; their backends: " + join(listed(kinds)));
    return choices;
}

Named<const EngineSpec*> require(const Named<Choice>& choices) {
    Named<const EngineSpec*> specs;
    Strings lacking;
    std::set<std::string> reasons;
    for (const auto& [name, choice] : choices) {
        specs[name] = choice.spec;
        if (choice.spec) continue;
        lacking.push_back(name);
        for (const auto& [engine, reason] : choice.misfits) reasons.insert(engine + " " + reason);
    }
    if (!lacking.empty()) throw Error(environment, "no engine of " + join(lacking) + " can run here: " + join(listed(reasons), "; "));
    return specs;
}

std::string outside(const EngineSpec& spec, std::int64_t side) {
    const Range& sides = spec.profile.side_px;
    if (side >= sides.least && side <= sides.most) return "";
    return "takes tiles of " + std::to_string(sides.least) + " to " + std::to_string(sides.most) + " px, and these have " + std::to_string(side);
}

}  // namespace tw
