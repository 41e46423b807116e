#include "text/post_processor.h"

namespace mla::text {
namespace {

// A template such as <s> $A </s>.
PostProcessor read_template(const Config& config) {
    const Config pieces = config.at("single");
    const Config specials = config.at("special_tokens");
    PostProcessor result;
    bool text_seen = false;
    for (size_t i = 0; i < pieces.size(); ++i) {
        const Config piece = pieces[i];
        if (const auto sequence = piece.find("Sequence")) {
            if (sequence->at("id").text() != "A" || text_seen) {
                throw unsupported(join("the template at ", pieces.path()))
                    .found("more than the text itself, at ", piece.path())
                    .allowed("special tokens, and the sequence A once");
            }
            text_seen = true;
            continue;
        }
        const std::string& name = piece.at("SpecialToken").at("id").text();
        const Config ids = specials.at(name.c_str()).at("ids");
        auto& target = text_seen ? result.after : result.before;
        for (size_t k = 0; k < ids.size(); ++k) target.push_back(ids[k].integer(kMaxIds));
    }
    if (!text_seen) {
        throw unsupported(join("the template at ", pieces.path()))
            .found("no text in it")
            .allowed("special tokens, and the sequence A once");
    }
    return result;
}

void apply(const Config& config, PostProcessor& result, bool& seen, int depth) {
    const std::string& type = config.at("type").text();
    if (type == "Sequence") {
        if (depth == kMaxDepth)
            throw unsupported(join("more than ", kMaxDepth, " nested post-processors"));
        const Config parts = config.at("processors");
        for (size_t i = 0; i < parts.size(); ++i) apply(parts[i], result, seen, depth + 1);
    } else if (type == "TemplateProcessing") {
        if (seen)
            throw unsupported("a second template at " + config.path()).allowed("one template");
        result = read_template(config);
        seen = true;
    } else if (type != "ByteLevel") {  // which changes offsets only
        throw unknown_component(config, "post-processor",
                                "Sequence, TemplateProcessing, ByteLevel");
    }
}

}  // namespace

PostProcessor read_post_processor(const Config& config) {
    PostProcessor result;
    bool seen = false;
    apply(config, result, seen, 0);
    return result;
}

}  // namespace mla::text
