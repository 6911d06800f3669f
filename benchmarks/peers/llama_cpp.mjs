// llama.cpp through node-llama-cpp: one JSON command a line in, one JSON answer a line out.
//   node llama_cpp.mjs FOLDER_OF_NPM MODEL.gguf THREADS POSITIONS
// {"prefill": n}            reads n tokens into an empty cache
// {"decode": past, "steps": n}  n tokens behind `past` others, one at a time, the likeliest each
// Answers hold wall and processor seconds of all threads.
import {createRequire} from "node:module";
import {createInterface} from "node:readline";
import {pathToFileURL} from "node:url";
import path from "node:path";

const [folder, modelPath, threads, positions] = process.argv.slice(2);
const require = createRequire(path.join(path.resolve(folder), "package.json"));
const root = require.resolve("node-llama-cpp");
const {getLlama, LlamaLogLevel} = await import(pathToFileURL(root).href);
const say = (answer) => process.stdout.write(JSON.stringify(answer) + "\n");

const llama = await getLlama({
    gpu: false, build: "never", skipDownload: true, logLevel: LlamaLogLevel.error
});
const model = await llama.loadModel({modelPath, gpuLayers: 0});
const context = await model.createContext({
    contextSize: Number(positions), batchSize: 512, threads: Number(threads)
});
const sequence = context.getSequence();
const tokens = (count) => Array.from({length: count}, (_, index) => 1 + (index * 7) % 90);

async function measured(work) {
    const cpu = process.cpuUsage();
    const begin = process.hrtime.bigint();
    await work();
    const wall = Number(process.hrtime.bigint() - begin) * 1e-9;
    const {user, system} = process.cpuUsage(cpu);
    say({wall_s: wall, processor_s: (user + system) * 1e-6, position: sequence.nextTokenIndex});
}

async function decode(steps) {
    let done = 0;
    for await (const _ of sequence.evaluate([5], {temperature: 0})) {
        if (++done >= steps)
            break;
    }
}

say({system: llama.systemInfo, release: llama.llamaCppRelease.release});
for await (const line of createInterface({input: process.stdin})) {
    const asked = JSON.parse(line);
    if (asked.prefill !== undefined) {
        await sequence.clearHistory();
        await measured(() => sequence.evaluateWithoutGeneratingNewTokens(tokens(asked.prefill)));
    } else {
        const extra = sequence.nextTokenIndex - asked.decode;
        if (extra < 0 || asked.decode === 0) {
            await sequence.clearHistory();
            if (asked.decode > 0)
                await sequence.evaluateWithoutGeneratingNewTokens(tokens(asked.decode));
        } else if (extra > 0)
            await sequence.eraseContextTokenRanges([
                {start: asked.decode, end: sequence.nextTokenIndex}
            ]);
        await measured(() => decode(asked.steps));
    }
}
await llama.dispose();
