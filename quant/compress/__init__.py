"""From ordinary attention (MHA, GQA) to MLA: `mla-deploy convert`.

| file | holds |
|---|---|
| `source` | what is converted: config.json of Llama, Mistral, Qwen2, Qwen3 and SmolLM models |
| `layer` | one layer of it in torch, and its attention once converted |
| `calibration` | the token windows that are measured on |
| `moments` | what is measured of a layer's queries, keys and values |
| `basis` | which channels keep their rotary positions, and in what basis |
| `latent` | the shared latent of all other channels and the values |
| `methods` | the query-aware method and the published ones, from moments to weights |
| `geometry`, `options` | the sizes of the result, and what can be chosen |
| `layout` | the tensors and config.json of the result |
| `streams` | hidden states on their way through the layers, measured and compared |
| `heal` | training that mends what was lost |
| `convert` | the whole way, layer by layer |
| `partial` | what an interrupted run goes on from |
| `report`, `report_page` | what was done, as figures and as a page |
| `estimate` | what it would cost |

Notation: D = hidden_size, H = num_attention_heads, G = num_key_value_heads, d = head_dim of the
source; R = qk_rope_head_dim, r = kv_lora_rank of the result. Query head h reads key head
`h // (H / G)`. It may import what `mla_deploy.quant` may.
"""
