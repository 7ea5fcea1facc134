// llama.cpp behind side_by_side.py, by npm's node-llama-cpp (its binaries choose the CPU's instruction set).
//
//   node llama_cpp.mjs FOLDER MODEL.gguf THREADS     FOLDER: where node-llama-cpp was installed
//
// A line in, {"ids": prompt, "limit": new tokens, "ends": [ids]}; a line out, {"ids", "prefill", "decode", "passes"}.

import { createRequire } from "node:module";
import { resolve } from "node:path";
import { createInterface } from "node:readline";
import { pathToFileURL } from "node:url";

const [folder, file, threads] = process.argv.slice(2);
const entry = createRequire(resolve(folder, "package.json")).resolve("node-llama-cpp");
const { getLlama, LlamaLogLevel } = await import(pathToFileURL(entry));
const llama = await getLlama({ gpu: false, build: "never", maxThreads: +threads, logLevel: LlamaLogLevel.error });
const model = await llama.loadModel({ modelPath: resolve(file) });
const context = await model.createContext({ contextSize: 4096, batchSize: 2048, threads: +threads });
const sequence = context.getSequence();
const about = `llama.cpp ${llama.llamaCppRelease.release}, ${llama.systemInfo.trim()}`;
console.log(JSON.stringify({ about }));

for await (const line of createInterface({ input: process.stdin })) {
    const { ids, limit, ends } = JSON.parse(line);
    await sequence.clearHistory();
    const made = [];
    const began = performance.now();
    let first = began;
    for await (const token of sequence.evaluate(ids, { temperature: 0, yieldEogToken: true })) {
        made.push(token);
        if (made.length === 1) first = performance.now();
        if (made.length === limit || ends.includes(token)) break;
    }
    const ended = performance.now();
    const seconds = { prefill: (first - began) / 1000, decode: (ended - first) / 1000 };
    console.log(JSON.stringify({ ids: made, passes: made.length - 1, ...seconds }));
}
process.exit(0);
