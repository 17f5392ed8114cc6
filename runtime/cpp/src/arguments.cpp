// The arguments that a caller may set, and their names and ranges. As runtime/bundle/arguments.py.
#include <algorithm>
#include <cmath>
#include <cstdio>

#include "documents.hpp"

namespace tw {
namespace {

const std::set<std::string> OPTIONS = {
    "bundle",      "expect", "explain", "force", "format", "help",    "json",    "max_pixels",  "memory",  "memory_limit", "overlap", "quiet",
    "resolutions", "runs",   "scale",   "seed",  "steps",  "threads", "tile",    "verbose",     "version", "weights_dir",  "devices", "engine",
    "batch",       "resume", "checkpoint", "cluster", "bits",  "color",   "jitter",  "native",      "eager",   "html",        "interpolate"};
const std::set<std::string> PARAMETERS = {"self", "image", "restorer", "sizes", "on_progress", "on_part", "beside"};
const std::set<std::string> KEYWORDS = {
    "False", "None", "True",   "and",  "as",     "assert", "async", "await",    "break", "class", "continue", "def",
    "del",   "elif", "else",   "except", "finally", "for", "from",  "global",   "if",    "import", "in",      "is",
    "lambda", "nonlocal", "not", "or", "pass",   "raise",  "return", "try",     "while", "with",  "yield"};

std::string plain(const Scalar& value) {
    if (value.kind == Scalar::real && value.number == std::floor(value.number)) {
        char text[400];
        std::snprintf(text, sizeof text, "%.0f", value.number);
        return text;
    }
    return value.kind == Scalar::words ? '"' + value.text + '"' : value.repr();
}

void check_range(const std::string& where, const Input& spec) {
    double least = spec.least.kind == Scalar::none ? -HUGE_VAL : spec.least.number;
    double most = spec.most.kind == Scalar::none ? HUGE_VAL : spec.most.number;
    bool bounded = spec.least.kind != Scalar::none || spec.most.kind != Scalar::none;
    if (bounded && (!spec.shape.empty() || !spec.choices.empty()))
        throw Error(damaged, where + ": only a single number without choices has a range; remove least and most");
    if (least > most) throw Error(damaged, where + ": least " + general(least) + " is above most " + general(most) + "; exchange them");
    bool number = spec.standard.kind == Scalar::whole || spec.standard.kind == Scalar::real;
    if (number && !(least <= spec.standard.number && spec.standard.number <= most))
        throw Error(damaged, where + ": default " + plain(spec.standard) + " is not " + argument_of(spec).takes());
}

bool is_argument_name(const std::string& name) {
    bool small = !name.empty() && name[0] >= 'a' && name[0] <= 'z' && name.back() != '_' && name.find("__") == std::string::npos;
    for (char c : name) small = small && ((c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_');
    return small;
}

}  // namespace

void check_arguments(const Program& program) {
    for (const auto& [name, spec] : program.inputs) check_range("program: input " + repr(name), spec);
    std::vector<std::pair<std::string, std::string>> named;
    for (const auto& [name, text] : program.texts) named.emplace_back(name, text.help);
    for (const auto& [name, file] : program.files) named.emplace_back(name, file.help);
    for (const auto& [name, spec] : program.inputs)
        if (spec.shape.empty()) named.emplace_back(name, spec.help);
    for (const auto& [name, help] : named) {
        const std::string where = "program: argument " + repr(name);
        std::string flag = "--" + name;
        std::replace(flag.begin(), flag.end(), '_', '-');
        if (OPTIONS.count(name)) throw Error(damaged, where + ": the command line has its own " + flag + "; rename the argument");
        if (PARAMETERS.count(name) || KEYWORDS.count(name)) throw Error(damaged, where + ": Python has its own " + repr(name) + "; rename the argument");
        if (!is_argument_name(name)) throw Error(damaged, where + ": use small letters, digits, and single underscores between them");
        auto same = [&name = name](const auto& other) { return other.first == name; };
        if (std::count_if(named.begin(), named.end(), same) > 1) throw Error(damaged, where + ": the name is taken; give every argument its own");
        if (!printable(help)) throw Error(damaged, where + ": help " + repr(help) + " is not one printable line; rewrite it");
    }
}

Argument argument_of(const Input& spec) {
    Argument argument;
    argument.help = spec.help;
    argument.needed = spec.standard.kind == Scalar::none;
    if (!spec.choices.empty()) {
        argument.kind = "choice";
        std::vector<std::pair<std::int64_t, std::string>> order;
        for (const auto& [name, number] : spec.choices) {
            order.emplace_back(number, name);
            if (argument.standard.kind == Scalar::none && !argument.needed && static_cast<double>(number) == spec.standard.number) {
                argument.standard.kind = Scalar::words;
                argument.standard.text = name;
            }
        }
        std::stable_sort(order.begin(), order.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
        for (const auto& [number, name] : order) argument.choices.push_back(name);
        return argument;
    }
    argument.kind = is_float(spec.dtype) ? "number" : "integer";
    if (spec.standard.kind != Scalar::words) argument.standard = spec.standard;
    argument.least = spec.least;
    argument.most = spec.most;
    return argument;
}

std::string Argument::takes() const {
    if (kind == "choice") return "one of " + join(choices);
    static const std::map<std::string, std::string> names = {
        {"words", "words"}, {"tensors", "a safetensors file"}, {"number", "a number"}, {"integer", "a whole number"}};
    const std::string& name = names.at(kind);
    bool low = least.kind != Scalar::none, high = most.kind != Scalar::none;
    if (low && high) return name + " from " + plain(least) + " to " + plain(most);
    return name + (low ? " of at least " + plain(least) : high ? " of at most " + plain(most) : "");
}

Named<Argument> arguments_of(const Program& program) {
    Named<Argument> arguments;
    std::set<std::string> of_words, needed;
    for (const auto& [name, text] : program.texts) {
        Argument argument;
        argument.kind = "words";
        argument.help = text.help;
        argument.needed = !text.standard;
        if (text.standard) {
            argument.standard.kind = Scalar::words;
            argument.standard.text = *text.standard;
        }
        arguments[name] = argument;
        for (const auto& [target, file] : text.ids) of_words.insert(target);
    }
    for (const auto& [name, spec] : program.inputs)
        if (spec.standard.kind == Scalar::none && !of_words.count(name)) needed.insert(name);
    for (const auto& [name, file] : program.files) {
        Argument argument;
        argument.kind = "tensors";
        argument.help = file.help;
        for (const auto& [tensor, target] : file.tensors) argument.needed = argument.needed || needed.count(target);
        arguments[name] = argument;
    }
    for (const auto& [name, spec] : program.inputs)
        if (spec.shape.empty()) arguments[name] = argument_of(spec);
    return arguments;
}

}  // namespace tw
