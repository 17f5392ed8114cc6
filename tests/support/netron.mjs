// Opens graphs as Netron's window does and reads every weight in a file: node netron.mjs FOLDER-OF-NETRON GRAPH...
import { createHash } from "node:crypto";
import fs from "node:fs";
import path from "node:path";
import { pathToFileURL } from "node:url";

const [, , netron, ...graphs] = process.argv;
const load = (id) => import(pathToFileURL(path.join(netron, `${id}.js`)));
const [view, node] = await Promise.all([load("./view"), load("./node")]);

const streamOf = (file) => {
    const { size, mtimeMs } = fs.statSync(file);
    return new node.FileStream(file, 0, size, mtimeMs);
};

class Context {
    constructor(file) {
        this.identifier = path.basename(file);
        this.folder = path.dirname(file);
        this.stream = streamOf(file);
        this.entries = new Map();
    }
    require(id) {
        return load(id);
    }
    async asset(file) {
        return fs.readFileSync(path.join(netron, file), "utf-8");
    }
    async fetch(file) {
        return streamOf(path.join(this.folder, file));
    }
    error(error) {
        throw error;
    }
}

const host = { require: load, event() {}, asset: Context.prototype.asset, exception: Context.prototype.error };
const answers = {};
for (const file of graphs) {
    const model = await new view.ModelFactoryService(host).open(new Context(file));
    const [graph] = model.modules;
    const tensors = {};
    for (const n of graph.nodes) {
        for (const argument of n.inputs) {
            for (const value of (argument.value || []).filter((v) => v && v.initializer)) {
                const tensor = value.initializer;
                await tensor.read?.();
                if (tensor.values instanceof Uint8Array) {
                    tensors[value.name] = createHash("sha256").update(tensor.values).digest("hex");
                }
            }
        }
    }
    answers[path.basename(file)] = { format: model.format, nodes: graph.nodes.length, tensors };
}
console.log(JSON.stringify(answers));
