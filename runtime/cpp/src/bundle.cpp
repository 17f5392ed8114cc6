#include "bundle.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>

namespace tw {
namespace {

namespace fs = std::filesystem;

const std::map<std::string, std::pair<std::string, int>> SAFETENSORS_DTYPES = {
    {"F32", {"float32", 4}},       {"F16", {"float16", 2}},     {"BF16", {"bfloat16", 2}}, {"F64", {"float64", 8}},
    {"F8_E4M3", {"float8_e4m3fn", 1}}, {"F8_E5M2", {"float8_e5m2", 1}}, {"I64", {"int64", 8}},     {"I32", {"int32", 4}},
    {"I16", {"int16", 2}},         {"I8", {"int8", 1}},         {"U8", {"uint8", 1}},      {"BOOL", {"bool", 1}}};
const Strings OTHER_FORMATS = {"aoti", "tensorrt"};  // backends whose graphs are not ONNX

bool is_file(const Path& path) {
    std::error_code error;
    return fs::is_regular_file(path, error);
}

// Refuses a name that is no plain relative path, and a link that leads out of the bundle.
void check_inside(const Path& root, const std::string& name, const std::string& where) {
    bool plain = !name.empty() && name.find('\\') == std::string::npos && printable(name);
    std::size_t at = 0;
    while (plain && at <= name.size()) {
        std::size_t end = std::min(name.find('/', at), name.size());
        std::string part = name.substr(at, end - at);
        plain = !part.empty() && part != "." && part != "..";
        at = end + 1;
    }
    if (!plain) throw Error(damaged, where + ": path " + repr(name) + " is not a plain relative POSIX path; rebuild the bundle");
    std::error_code error;
    Path real = fs::weakly_canonical(root / name, error), home = error ? Path() : fs::weakly_canonical(root, error);
    bool inside = !error && std::mismatch(home.begin(), home.end(), real.begin(), real.end()).first == home.end();
    if (!inside) throw Error(damaged, where + ": " + repr(name) + " leaves the bundle through a link; copy the bundle with its files");
}

void check_files(const Path& root, const Named<File>& files, const std::string& remedy, bool fresh) {
    for (const auto& [name, file] : files) {
        Path path = root / name;
        if (!is_file(path)) throw Error(damaged, path.string() + ": missing; " + remedy);
        auto size = static_cast<std::int64_t>(fs::file_size(path));
        if (size != file.size)
            throw Error(damaged, path.string() + ": " + std::to_string(size) + " bytes, sealed with " + std::to_string(file.size) + "; " + remedy);
        if (sha256_of_file(path, fresh) != file.sha256)
            throw Error(damaged, path.string() + ": SHA-256 differs from the sealed " + file.sha256.substr(0, 12) + "...; " + remedy);
    }
}

void check_weights(const Bundle& bundle) {
    const Weights& weights = bundle.weights;
    const Manifest& manifest = bundle.manifest;
    const std::string where = (bundle.root / manifest.weights).string();
    std::set<std::string> tables;
    for (const auto& [name, component] : manifest.components)
        for (const auto& engine : component.engines)
            if (engine.weights && !engine.weights->empty()) tables.insert(*engine.weights);
    for (const auto& table : tables)
        if (!weights.tensors.count(table))
            throw Error(damaged, (bundle.root / "bundle.json").string() + ": " + manifest.weights + " has no table " + repr(table) + "; rebuild the bundle");
    for (const auto& [component, references] : weights.tensors) {
        if (!manifest.components.count(component) && !tables.count(component))
            throw Error(damaged, where + ": weights of " + repr(component) + ", which is no component; rebuild the bundle");
        for (const auto& [name, reference] : references) {
            auto folder = weights.folders.find(reference.folder);
            bool listed = folder != weights.folders.end() && folder->second.files.count(reference.file);
            const std::string tensor = where + ": " + component + "." + name;
            if (!listed) throw Error(damaged, tensor + " lies in " + repr(reference.file) + ", which is not listed");
            if (reference.length > folder->second.files.at(reference.file).size - reference.offset)
                throw Error(damaged, tensor + " reaches past the end of " + repr(reference.file));
        }
    }
    for (const auto& [name, folder] : weights.folders) {
        if (folder.path && (folder.path->empty() || (*folder.path)[0] != '/'))
            throw Error(damaged, where + ": folder " + repr(name) + ": path " + repr(*folder.path) + " is not absolute; rebuild the bundle");
        check_inside(bundle.root, "weights/" + name, where);
        for (const auto& [file, sealed] : folder.files) check_inside(bundle.root, "weights/" + name + "/" + file, where);
    }
}

// Refuses graphs that read other bytes than weights.json says.
void check_graphs(const Bundle& bundle) {
    for (const auto& [component, c] : bundle.manifest.components) {
        std::set<std::pair<std::string, std::string>> graphs = {{c.graph, component}};
        for (const auto& e : c.engines)
            if (std::find(OTHER_FORMATS.begin(), OTHER_FORMATS.end(), e.backend) == OTHER_FORMATS.end())
                graphs.insert({e.files[0], e.weights && !e.weights->empty() ? *e.weights : component});
        for (const auto& [file, table] : graphs) {
            const std::string where = (bundle.root / file).string();
            auto listed = bundle.weights.tensors.find(table);
            for (const auto& [name, external] : external_data(bytes_of(bundle.root / file), where)) {
                const Reference* reference = nullptr;
                if (listed != bundle.weights.tensors.end())
                    if (auto entry = listed->second.find(name); entry != listed->second.end()) reference = &entry->second;
                bool same = reference && external.location == reference->location() && external.offset == reference->offset &&
                            external.length == reference->length && external.dtype == reference->dtype && external.shape == reference->shape;
                if (!same)
                    throw Error(damaged, where + ": " + repr(name) + " is " + external.dtype + " " + repr(external.shape) + ", " +
                                             std::to_string(external.length) + " bytes at " + std::to_string(external.offset) + " of " +
                                             repr(external.location) + ", which " + bundle.manifest.weights + " does not say; rebuild the bundle");
            }
        }
    }
}

void check_pin(const std::string& digest, const std::optional<std::string>& expect, const std::string& where) {
    if (!expect) return;
    std::string pin = *expect;
    for (char& c : pin) c = static_cast<char>(c >= 'A' && c <= 'Z' ? c + 32 : c);
    if (pin.size() < 12 || pin.size() > 64 || pin.find_first_not_of("0123456789abcdef") != std::string::npos)
        throw Error(usage, "--expect " + repr(one_line(*expect)) + " is no digest; give 12 to 64 hexadecimal digits of one");
    if (digest.compare(0, pin.size(), pin) != 0)
        throw Error(damaged, where + ": SHA-256 " + digest + " is not the expected " + *expect + "; get the bundle you pinned");
}

Stored stored(const Json& entry, std::int64_t base, std::int64_t size) {
    const Json *offsets = entry.find("data_offsets"), *kind = entry.find("dtype"), *shape = entry.find("shape");
    if (!offsets || !kind || !shape || offsets->kind != Json::list || offsets->items.size() != 2 || shape->kind != Json::list)
        throw Invalid("a tensor without data_offsets, dtype or shape");
    auto dtype = SAFETENSORS_DTYPES.find(kind->text);
    if (dtype == SAFETENSORS_DTYPES.end()) throw Invalid(repr(kind->text));
    Stored out{{dtype->second.first, {}}, 0, 0};
    std::int64_t bytes = dtype->second.second;
    for (const auto& item : shape->items) {
        if (item.kind != Json::integer || item.huge || item.whole < 1) throw Invalid("a size that is no whole number of at least 1");
        if (item.whole > INT64_MAX / bytes) throw Invalid("a shape beyond 64 bits");
        bytes *= item.whole;
        out.spec.shape.push_back({item.whole, ""});
    }
    const Json &start = offsets->items[0], &end = offsets->items[1];
    if (start.kind != Json::integer || end.kind != Json::integer || start.huge || end.huge) throw Invalid("offsets that are no whole numbers");
    const std::string span = "offsets " + start.text + ".." + end.text;
    if (start.whole < 0 || start.whole > end.whole || end.whole > size - base) throw Invalid(span + " lie outside the file");
    if (end.whole - start.whole != bytes) throw Invalid(span + " do not hold " + out.spec.dtype + " " + repr(out.spec.shape));
    out.start = base + start.whole;
    out.length = bytes;
    return out;
}

}  // namespace

Mapped::Mapped(const Path& path) {
    int file = ::open(path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    struct stat facts {};
    bool fits = file >= 0 && ::fstat(file, &facts) == 0 && S_ISREG(facts.st_mode);
    std::string reason = file < 0 ? std::strerror(errno) : "is no regular file";
    size_ = fits ? static_cast<std::size_t>(facts.st_size) : 0;
    void* memory = fits && size_ ? ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file, 0) : nullptr;
    if (memory == MAP_FAILED) fits = false, reason = std::strerror(errno);
    if (file >= 0) ::close(file);
    if (!fits) throw Error(damaged, path.string() + ": " + reason + "; rebuild the bundle");
    data_ = static_cast<const unsigned char*>(memory);
}

Mapped::~Mapped() {
    if (data_) ::munmap(const_cast<unsigned char*>(data_), size_);
}

std::string bytes_of(const Path& path) {
    Mapped bytes(path);
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

Named<Stored> safetensors_header(const unsigned char* data, std::size_t size, const std::string& where) {
    std::uint64_t length = 0;
    for (std::size_t i = 0; i < std::min<std::size_t>(8, size); ++i) length |= std::uint64_t{data[i]} << 8 * i;
    if (size < 8 || length > std::min<std::uint64_t>(size - 8, 100000000))
        throw Error(damaged, where + ": not a safetensors file, or cut short; copy it again");
    try {
        Json header = parse_json({reinterpret_cast<const char*>(data) + 8, static_cast<std::size_t>(length)}, where);
        if (header.kind != Json::object) throw Invalid("no object");
        Named<Stored> tensors;
        for (const auto& [name, entry] : header.members)
            if (name != "__metadata__") tensors.emplace(name, stored(entry, 8 + static_cast<std::int64_t>(length), static_cast<std::int64_t>(size)));
        return tensors;
    } catch (const std::runtime_error& error) {
        throw Error(damaged, one_line(where + ": unreadable safetensors header (" + error.what() + "); copy it again"));
    }
}

Path Bundle::folder(const std::string& name, const std::optional<Path>& weights_dir) const {
    const Folder& folder = weights.folders.at(name);
    std::vector<Path> candidates = {root / "weights" / name};
    if (weights_dir) {
        candidates.push_back(*weights_dir / name);
        candidates.push_back(*weights_dir);
        std::vector<Path> below;
        for (const auto& entry : fs::directory_iterator(*weights_dir))
            if (fs::exists(entry.path() / name)) below.push_back(entry.path() / name);
        std::sort(below.begin(), below.end());
        candidates.insert(candidates.end(), below.begin(), below.end());
    }
    if (folder.path && !folder.path->empty()) candidates.emplace_back(*folder.path);
    std::optional<Error> wrong;
    Strings searched;
    for (const auto& candidate : candidates) {
        searched.push_back(one_line(candidate.string()));
        bool all = true;
        for (const auto& [file, sealed] : folder.files) all = all && is_file(candidate / file);
        if (!all) continue;
        try {
            check_files(candidate, folder.files, "give the folder this bundle was built from", fresh);
            return candidate;
        } catch (const Error& error) {  // files of another folder may have the same names
            if (!wrong) wrong = error;
        }
    }
    if (wrong) throw Error(*wrong);
    Strings names = keys(folder.files);
    names.resize(std::min<std::size_t>(3, names.size()));
    throw Error(damaged, root.string() + ": weights " + one_line(join(names)) + " of " + repr(name) + " are in none of " + join(searched) +
                             "; pass --weights-dir, or rebuild with --pack");
}

Named<Path> Bundle::files_of(const std::string& table, const std::optional<Path>& weights_dir) const {
    Named<Path> files, folders;
    auto references = weights.tensors.find(table);
    if (references == weights.tensors.end()) return files;
    for (const auto& [name, reference] : references->second) {
        if (!folders.count(reference.folder)) folders[reference.folder] = folder(reference.folder, weights_dir);
        files[reference.location()] = folders[reference.folder] / reference.file;
    }
    return files;
}

Bundle read_bundle(const Path& root, const std::optional<std::string>& expect, bool fresh) {
    try {
        Path first = root / "bundle.json";
        const std::string where = first.string();
        if (!is_file(first)) throw Error(damaged, root.string() + ": no bundle.json there; give the directory that 'tilewright export build' made");
        Bundle bundle;
        bundle.root = root;
        bundle.fresh = fresh;
        std::string text = bytes_of(first);
        bundle.digest = sha256(text.data(), text.size());
        check_pin(bundle.digest, expect, where);
        const Manifest& manifest = bundle.manifest = read_manifest(parse_json(text, where), where);
        Strings names = keys(manifest.files), used = manifest.named_files();
        names.insert(names.end(), used.begin(), used.end());
        for (const auto& name : names) {
            check_inside(root, name, where);
            if (!manifest.files.count(name)) throw Error(damaged, where + ": " + repr(name) + " is used but not listed under files; rebuild the bundle");
        }
        check_files(root, manifest.files, "rebuild the bundle, or copy it again", fresh);
        const std::string program = (root / manifest.program).string(), weights = (root / manifest.weights).string();
        bundle.program = read_program(parse_json(bytes_of(program), program), program);
        if (manifest.constants) {
            Mapped constants(root / *manifest.constants);
            bundle.constants = safetensors_header(constants.data(), constants.size(), (root / *manifest.constants).string());
        }
        Named<Signature> signatures;
        Named<TensorSpec> specs;
        for (const auto& [name, component] : manifest.components) signatures[name] = {component.inputs, component.outputs};
        for (const auto& [name, constant] : bundle.constants) specs[name] = constant.spec;
        try {
            check_program(bundle.program, signatures, specs);
        } catch (const Error& error) {
            std::string complaint = error.what();
            if (complaint.rfind("program: ", 0) == 0) complaint.erase(0, 9);
            throw Error(damaged, program + ": " + complaint);
        }
        Named<Argument> arguments = arguments_of(bundle.program);
        std::set<std::string> all = key_set(arguments);
        for (const auto& [name, argument] : manifest.arguments) all.insert(name);
        for (const auto& name : all) {
            bool same = manifest.arguments.count(name) && arguments.count(name) && manifest.arguments.at(name) == arguments.at(name);
            if (!same) throw Error(damaged, where + ": argument " + repr(name) + " differs from " + manifest.program + "; rebuild the bundle");
        }
        for (const auto& [name, words] : bundle.program.texts)
            for (const auto& [target, file] : words.ids)
                if (std::find(manifest.tokenizers.begin(), manifest.tokenizers.end(), file) == manifest.tokenizers.end())
                    throw Error(damaged, program + ": tokenizer " + repr(file) + " is not listed; rebuild the bundle");
        bundle.weights = read_weights(parse_json(bytes_of(weights), weights), weights);
        check_weights(bundle);
        check_graphs(bundle);
        return bundle;
    } catch (const Error& error) {
        throw Error(error.code, one_line(error.what()));
    } catch (const fs::filesystem_error& error) {
        throw Error(damaged, one_line(root.string() + ": " + error.code().message() + "; copy the bundle again"));
    }
}

}  // namespace tw
