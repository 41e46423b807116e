#include "core/bundle.h"

#include <algorithm>
#include <filesystem>

#include "core/error.h"
#include "core/file.h"

namespace mla::core {

namespace {

namespace fs = std::filesystem;

constexpr const char* kManifest = "manifest.json";
constexpr uint64_t kMaxManifestBytes = 16 << 20;
constexpr uint64_t kLargeFileBytes = 64 << 20;

Error bad(std::string what) { return Error(MLA_BAD_BUNDLE, std::move(what)); }

std::string read_manifest(const std::string& path) {
    InputFile file(path);
    if (file.size() > kMaxManifestBytes) {
        throw bad(path + " is too large")
            .found(file.size(), " bytes")
            .allowed(kMaxManifestBytes, " bytes")
            .next("export the model again");
    }
    std::string text(static_cast<size_t>(file.size()), '\0');
    file.read(text.data(), text.size());
    return text;
}

// Whether `path` is in `folder` when all links are followed.
bool leads_inside(const fs::path& folder, const fs::path& path) {
    std::error_code error;
    const fs::path root = fs::canonical(folder, error);
    if (error) return false;
    const fs::path target = fs::weakly_canonical(path, error);
    if (error) return false;  // such as a loop of links
    return std::mismatch(root.begin(), root.end(), target.begin(), target.end()).first ==
           root.end();
}

void check_file(const std::string& folder, const FileEntry& entry, bool verify) {
    const std::string path = folder + "/" + entry.path;
    if (!leads_inside(folder, path)) {
        throw bad(path + " leaves the bundle through a symbolic link")
            .next("copy the file instead");
    }
    std::error_code error;
    if (!fs::is_regular_file(path, error)) {
        throw bad(path + " is missing").next("copy the bundle whole, or export again");
    }
    const uint64_t size = fs::file_size(path, error);
    if (error || size != entry.bytes) {
        throw bad(path + " is not of the size in the manifest")
            .found(size, " bytes")
            .allowed(entry.bytes, " bytes")
            .next("copy the bundle again, or export again");
    }
    if ((verify || size <= kLargeFileBytes) && hex(sha256_of(path)) != entry.sha256) {
        throw bad(path + " is damaged: its sha256 is not the manifest's")
            .next("copy the bundle again, or export again");
    }
}

}  // namespace

Bundle Bundle::open(const std::string& folder, bool verify) {
    const std::string path = folder + "/" + kManifest;
    std::error_code error;
    if (!fs::is_regular_file(path, error)) {
        throw bad(folder + " is not a bundle")
            .found("no ", kManifest)
            .next("make one with `mla-deploy export MODEL -o BUNDLE`");
    }
    try {
        Bundle bundle{folder, parse_manifest(read_manifest(path), path)};
        const auto& files = bundle.manifest.files;
        if (std::none_of(files.begin(), files.end(), [&](const FileEntry& entry) {
                return entry.path == bundle.manifest.graph_path;
            })) {
            throw bad(join(path, " does not list ", bundle.manifest.graph_path))
                .next("export the model again");
        }
        for (const FileEntry& entry : files) check_file(folder, entry, verify);
        return bundle;
    } catch (const Error& failure) {
        if (failure.status() != MLA_FILE_ERROR) throw;
        throw bad(failure.what());
    }
}

size_t Bundle::page_bytes() const {
    size_t bytes = 0;
    for (const LayerCache& layer : manifest.cache) {
        for (const CachePart& part : layer.parts) bytes += part.page_bytes();
    }
    return bytes;
}

Sha256::Digest Bundle::fingerprint() const {
    std::vector<std::string> lines;
    for (const FileEntry& entry : manifest.files) {
        lines.push_back(join("file ", entry.sha256, " ", entry.path, "\n"));
    }
    std::sort(lines.begin(), lines.end());  // the order in the manifest says nothing
    for (size_t layer = 0; layer < manifest.cache.size(); ++layer) {
        for (const CachePart& part : manifest.cache[layer].parts) {
            lines.push_back(join("part ", layer, " ", part.name, " ", name_of(part.type)));
            for (const int64_t extent : part.page_shape) lines.back() += join(" ", extent);
            lines.back() += "\n";
        }
    }
    Sha256 hash;
    for (const std::string& line : lines) hash.update(line.data(), line.size());
    return hash.finish();
}

}  // namespace mla::core
