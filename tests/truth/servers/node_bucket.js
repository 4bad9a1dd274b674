// SPDX-License-Identifier: Apache-2.0
//
// A Bucket on Node's own modules: one event loop, and file calls in libuv's pool of threads.
//
//     node node_bucket.js MODE ROOT TRUTH [--chunk=BYTES] [--verify] [--verify-reads] [--clock=FILE]
//
// MODE stream: a PUT's body is piped into the file as it comes. MODE buffer: it is collected, checked and then written.
// --chunk: what comes is collected to pieces of so many bytes, each of which is then hashed and written (stream).
// --verify: read each artifact back after storing it. --verify-reads: and before a GET with `digest=` is answered.
//
// With the header X-Test-Hide an upload is stored whatever its digest is; with X-Test-Corrupt-Stored a bit of the stored file is
// flipped before it is read back.
//
// The step `digest` is wall time around each call of the hash, and `digest_cpu`, with --clock and thread_clock.c as built there, the CPU
// time of the thread meanwhile: what the thread spent there, with whatever an observer's probes cost it. The time of an update with no bytes,
// measured at the start, is taken away: it is that of the clocks, and of the way from JavaScript to the library.
"use strict";

const crypto = require("node:crypto");
const fs = require("node:fs");
const http = require("node:http");
const { dirname } = require("node:path");
const { Transform } = require("node:stream");
const { pipeline } = require("node:stream/promises");
const { parseArgs, promisify } = require("node:util");

const { values: options, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    chunk: { type: "string" },
    clock: { type: "string" },
    verify: { type: "boolean" },
    "verify-reads": { type: "boolean" },
  },
});
const [mode, root, truth] = positionals;
const chunk = options.chunk === undefined ? null : Number(options.chunk);
const truthFd = fs.openSync(truth, "a");
const acceptedAt = new WeakMap();

const now = () => Number(process.hrtime.bigint());

// --- what a request did ---

// The CPU time of this thread in ns; not known without --clock.
function loadClock(path) {
  const loaded = { exports: {} };
  process.dlopen(loaded, path);
  return loaded.exports;
}

const threadCpu = options.clock === undefined ? null : loadClock(options.clock);

const READ_BACK = chunk ?? 65536;
const TRIES = 2000;

// SHA-256 of a request's bytes, which tells its work what each call took.
class Hash {
  constructor(work) {
    this.work = work;
    this.hash = crypto.createHash("sha256");
  }

  update(part) {
    this.timed(part.length, () => this.hash.update(part));
    return this;
  }

  finish() {
    return `sha256:${this.timed(0, () => this.hash.digest("hex"))}`;
  }

  timed(bytes, call) {
    const { result, wall, cpu } = stopwatch(call);
    this.work.addNs("digest", wall - empty.wall, bytes);
    if (threadCpu) this.work.addNs("digest_cpu", cpu - empty.cpu, bytes);
    return result;
  }
}

// What a call returns; its wall time and its CPU time in ns, with the cost of taking them.
function stopwatch(call) {
  const beginCpu = threadCpu?.() ?? 0;
  const beginNs = now();
  const result = call();
  const wall = now() - beginNs;
  return { result, wall, cpu: (threadCpu?.() ?? 0) - beginCpu };
}

// The median of updates with no bytes. The first half is there to warm up.
function timeOfNothing() {
  const [hash, nothing] = [crypto.createHash("sha256"), Buffer.alloc(0)];
  const times = Array.from({ length: TRIES }, () => stopwatch(() => hash.update(nothing))).slice(TRIES / 2);
  const median = (name) => times.map((time) => time[name]).sort((a, b) => a - b)[TRIES / 4];
  return { wall: median("wall"), cpu: median("cpu") };
}

const DATA_STEPS = { write: "storage_write", sync: "storage_sync", read: "storage_read" };

class Work {
  constructor(request) {
    this.request = request;
    this.beginNs = now();
    this.bytesIn = 0;
    this.bytesOut = 0;
    this.length = 0;
    this.steps = new Map();
    this.computed = null;
    this.verified = [];
    this.data = new Calls(this, (call) => DATA_STEPS[call] ?? call);
    this.metadata = new Calls(this, () => "metadata");
  }

  add(step, beginNs, bytes) {
    this.addNs(step, now() - beginNs, bytes);
  }

  addNs(step, ns, bytes) {
    const total = this.steps.get(step) ?? { step, ns: 0, bytes: 0, calls: 0 };
    total.ns += Math.max(0, ns);
    total.bytes += bytes;
    total.calls += 1;
    this.steps.set(step, total);
  }

  write(status, outcome, endNs) {
    const line = {
      request_id: this.request.headers["x-request-id"] ?? null,
      pid: process.pid,
      tid: null,
      method: this.request.method,
      target_path: this.request.url.split("?")[0],
      status,
      outcome,
      bytes_in: this.bytesIn,
      bytes_out: this.bytesOut,
      begin_ns: this.beginNs,
      accept_ns: acceptedAt.get(this.request.socket) ?? null,
      end_ns: endNs,
      steps: [...this.steps.values()],
      files: this.data.counts,
      metadata_files: this.metadata.counts,
      computed: this.computed,
      verified: this.verified,
    };
    fs.writeSync(truthFd, JSON.stringify(line) + "\n");
  }
}

// System calls on one kind of files and their folders: counts those that succeed, and adds up the time of all.
// `handle` is a fs.promises.FileHandle; `stepOf` gives the step of a call.
class Calls {
  constructor(work, stepOf) {
    this.work = work;
    this.stepOf = stepOf;
    this.counts = { opens: 0, write_calls: 0, write_bytes: 0, read_calls: 0, read_bytes: 0, syncs: 0, renames: 0 };
  }

  async open(path, flags) {
    const handle = await this.timed("open", () => fs.promises.open(path, flags));
    this.counts.opens += 1;
    return handle;
  }

  async write(handle, bytes) {
    const { bytesWritten } = await this.timed("write", () => handle.write(bytes, 0, bytes.length));
    this.count("write", bytesWritten);
  }

  // The library may write in several pieces, so that the number of calls is not known.
  async writeWhole(handle, bytes) {
    await this.timed("write", () => handle.writeFile(bytes));
    this.count("write", bytes.length);
    this.counts.write_calls = null;
  }

  async read(handle, bytes) {
    const { bytesRead } = await this.timed("read", () => handle.read(bytes, 0, bytes.length, null));
    this.count("read", bytesRead);
    return bytesRead;
  }

  async sync(handle) {
    await this.timed("sync", () => handle.sync());
    this.counts.syncs += 1;
  }

  async close(handle) {
    await this.timed("close", () => handle.close());
  }

  async makeFolder(path) {
    await this.timed("mkdir", () => fs.promises.mkdir(path, { recursive: true }));
  }

  // What is in a folder; nothing where there is none. That it is opened for this is not counted: it is no file.
  async names(folder) {
    return this.timed("list", () => fs.promises.readdir(folder)).catch(() => []);
  }

  // Nothing where it is gone already.
  async remove(path) {
    await this.timed("unlink", () => fs.promises.rm(path, { force: true }));
  }

  async rename(source, target) {
    await this.timed("rename", () => fs.promises.rename(source, target));
    this.counts.renames += 1;
  }

  count(what, bytes) {
    this.counts[`${what}_calls`] += 1;
    this.counts[`${what}_bytes`] += bytes;
    this.work.steps.get(this.stepOf(what)).bytes += bytes;
  }

  async timed(what, call) {
    const beginNs = now();
    try {
      return await call();
    } finally {
      this.work.add(this.stepOf(what), beginNs, 0);
    }
  }

  // Node's file functions for a stream, each counted. The calls of one file never overlap.
  get functions() {
    const counted = (what, call, note) => (...parameters) => {
      const callback = parameters.pop();
      const beginNs = now();
      call(...parameters, (error, ...results) => {
        this.work.add(this.stepOf(what), beginNs, 0);
        if (!error) note(results[0]);
        callback(error, ...results);
      });
    };
    const size = (what) => (bytes) => this.count(what, bytes);
    return {
      open: counted("open", fs.open, () => (this.counts.opens += 1)),
      write: counted("write", fs.write, size("write")),
      writev: counted("write", fs.writev, size("write")),
      read: counted("read", fs.read, size("read")),
      fsync: counted("sync", fs.fsync, () => (this.counts.syncs += 1)),
      close: counted("close", fs.close, () => {}),
    };
  }
}

// --- the store ---

class Problem extends Error {
  constructor(status, code) {
    super(code);
    this.status = status;
  }
}

const dataPath = (name) => `${root}/data/${name}`;
const sidecarPath = (name) => `${root}/meta/${name}.json`;
const temporaryPath = () => `${root}/tmp/${crypto.randomUUID()}`;
const nameOf = (document) => `${document.bucket_id}/${document.artifact_id}/${document.version}`;

async function load(work, path) {
  let handle;
  try {
    handle = await work.metadata.open(path, "r");
  } catch (error) {
    if (error.code === "ENOENT") return null;
    throw error;
  }
  try {
    const bytes = Buffer.alloc(65536);
    return JSON.parse(bytes.toString("utf8", 0, await work.metadata.read(handle, bytes)));
  } finally {
    await work.metadata.close(handle);
  }
}

function declared(request, bucketId, artifactId) {
  const names = ["x-artifact-version", "x-artifact-digest", "x-uploaded-by", "x-provenance-source"];
  if (names.some((name) => !request.headers[name])) throw new Problem(400, "missing_header");
  const [version, digest, uploadedBy, source] = names.map((name) => request.headers[name]);
  return {
    bucket_id: bucketId,
    artifact_id: artifactId,
    version,
    digest: digest.toLowerCase(),
    size_bytes: 0,
    created_at: "",
    uploaded_by: uploadedBy,
    provenance_source: source,
  };
}

function check(work, document, hash) {
  work.computed = hash.finish();
  if (document.digest !== work.computed && !work.request.headers["x-test-hide"]) throw new Problem(400, "digest_mismatch");
}

// The digest of a stored file.
async function readBack(work, path) {
  const hash = new Hash(work);
  const bytes = Buffer.alloc(READ_BACK);
  const handle = await work.data.open(path, "r");
  try {
    let size;
    while ((size = await work.data.read(handle, bytes))) hash.update(bytes.subarray(0, size));
  } finally {
    await work.data.close(handle);
  }
  return hash.finish();
}

// Whether the stored bytes are those that were received; told in the truth.
async function verify(work, path, digest) {
  const matches = (await readBack(work, path)) === digest;
  work.verified.push(matches ? "match" : "mismatch");
  return matches;
}

// Flips a bit of the byte in the middle, by calls that are not counted.
function corrupt(path) {
  const fd = fs.openSync(path, "r+");
  const byte = Buffer.alloc(1);
  const middle = Math.floor(fs.fstatSync(fd).size / 2);
  fs.readSync(fd, byte, 0, 1, middle);
  byte[0] ^= 1;
  fs.writeSync(fd, byte, 0, 1, middle);
  fs.closeSync(fd);
}

// Collects what comes to pieces of `size` bytes.
function collector(size) {
  let piece = Buffer.allocUnsafe(size);
  let filled = 0;
  return new Transform({
    transform(part, _encoding, callback) {
      for (let start = 0; start < part.length; ) {
        const copied = part.copy(piece, filled, start);
        start += copied;
        filled += copied;
        if (filled === size) {
          this.push(piece);
          piece = Buffer.allocUnsafe(size); // the one before may still wait to be written
          filled = 0;
        }
      }
      callback();
    },
    flush(callback) {
      callback(null, filled ? piece.subarray(0, filled) : undefined);
    },
  });
}

// Both return the status, and the document that then exists.

async function putStream(work, request, document) {
  const path = temporaryPath();
  const functions = work.data.functions;
  const hash = new Hash(work);
  const file = fs.createWriteStream(path, { flags: "wx", autoClose: false, fs: functions });
  const pieces = chunk === null ? request : collector(chunk);
  request.on("data", (part) => (work.bytesIn += part.length));
  pieces.on("data", (part) => hash.update(part));
  try {
    await new Promise((resolve, reject) => {
      request.on("close", () => request.complete || reject(new Error("the client left")));
      file.on("error", reject).on("finish", resolve);
      if (pieces !== request) request.pipe(pieces);
      pieces.pipe(file);
    });
    check(work, document, hash);
    await promisify(functions.fsync)(file.fd);
    return await commit(work, path, document);
  } finally {
    if (file.fd !== null) await promisify(functions.close)(file.fd);
    await work.data.remove(path);
  }
}

async function putBuffer(work, request, document) {
  const parts = [];
  for await (const part of request) {
    parts.push(part);
    work.bytesIn += part.length;
  }
  const bytes = Buffer.concat(parts);
  check(work, document, new Hash(work).update(bytes));
  const path = temporaryPath();
  const handle = await work.data.open(path, "wx");
  try {
    await work.data.writeWhole(handle, bytes);
    await work.data.sync(handle);
  } finally {
    await work.data.close(handle);
  }
  try {
    return await commit(work, path, document);
  } finally {
    await work.data.remove(path);
  }
}

async function commit(work, path, document) {
  const name = nameOf(document);
  const existing = await load(work, sidecarPath(name));
  if (existing) {
    if (existing.digest !== document.digest) throw new Problem(409, "version_conflict");
    return [200, existing];
  }
  document.size_bytes = work.bytesIn;
  document.created_at = new Date().toISOString();
  for (const [calls, path] of [[work.data, dataPath(name)], [work.metadata, sidecarPath(name)]]) {
    await calls.makeFolder(dirname(path));
  }
  await work.data.rename(path, dataPath(name));
  if (work.request.headers["x-test-corrupt-stored"]) corrupt(dataPath(name));
  if (options.verify && !(await verify(work, dataPath(name), work.computed))) {
    await work.data.remove(dataPath(name));
    throw new Problem(500, "post_storage_mismatch");
  }
  const temporary = `${root}/meta/${crypto.randomUUID()}.tmp`;
  const handle = await work.metadata.open(temporary, "wx");
  try {
    await work.metadata.write(handle, Buffer.from(JSON.stringify(document)));
    await work.metadata.sync(handle);
  } finally {
    await work.metadata.close(handle);
  }
  await work.metadata.rename(temporary, sidecarPath(name));
  return [201, document];
}

async function versions(work, bucketId, artifactId) {
  const folder = `${root}/meta/${bucketId}/${artifactId}`;
  const names = await work.metadata.names(folder);
  const found = await Promise.all(names.map((name) => load(work, `${folder}/${name}`)));
  return found.map(({ version, digest, size_bytes, created_at }) => ({ version, digest, size_bytes, created_at }));
}

// --- HTTP ---

function begin(work, response, status, type, length) {
  work.length = length;
  response.writeHead(status, { "Content-Type": type, "Content-Length": length });
}

function answer(work, response, status, content) {
  const bytes = Buffer.from(JSON.stringify(content));
  begin(work, response, status, "application/json", bytes.length);
  response.end(bytes);
  work.bytesOut = bytes.length;
}

async function get(work, response, bucketId, artifactId, query) {
  const document = await load(work, sidecarPath(`${bucketId}/${artifactId}/${query.get("version")}`));
  if (!document) throw new Problem(404, "not_found");
  const digest = query.get("digest");
  if (digest && digest.toLowerCase() !== document.digest) throw new Problem(412, "digest_precondition_failed");
  if (query.get("metadata_only") === "true") return answer(work, response, 200, document);
  if (options["verify-reads"] && digest && !(await verify(work, dataPath(nameOf(document)), document.digest))) {
    throw new Problem(500, "post_storage_mismatch");
  }
  begin(work, response, 200, "application/octet-stream", document.size_bytes);
  const file = fs.createReadStream(dataPath(nameOf(document)), { fs: work.data.functions });
  file.on("data", (part) => (work.bytesOut += part.length));
  // It comes after the last read is back, even where the client left before.
  const closed = new Promise((resolve) => file.on("close", resolve));
  try {
    await pipeline(file, response);
  } finally {
    await closed;
  }
}

async function serve(work, request, response) {
  const { pathname, searchParams } = new URL(request.url, "http://localhost");
  const [, v1, bucketId, artifactId, last, more] = pathname.split("/");
  if (v1 !== "v1" || !artifactId || more !== undefined || (last !== undefined && last !== "versions")) throw new Problem(404, "unknown_route");
  if (last) return answer(work, response, 200, { versions: await versions(work, bucketId, artifactId) });
  if (request.method === "PUT") {
    const put = mode === "stream" ? putStream : putBuffer;
    return answer(work, response, ...(await put(work, request, declared(request, bucketId, artifactId))));
  }
  if (request.method === "GET") return get(work, response, bucketId, artifactId, searchParams);
  throw new Problem(405, "method_not_allowed");
}

const empty = timeOfNothing();

const server = http.createServer((request, response) => {
  const work = new Work(request);
  let endNs = null;
  response.on("finish", () => (endNs = now()));
  // The answer is out, or the client is gone; what else the request had to do may still be under way.
  const answered = new Promise((resolve) => response.on("close", resolve));
  const served = serve(work, request, response).catch((error) => {
    if (response.headersSent || (request.destroyed && !request.complete)) return;
    const status = error instanceof Problem ? error.status : 500;
    if (status === 500) console.error(error);
    answer(work, response, status, { error: { code: error.message, message: error.message, details: {} } });
  });
  Promise.all([answered, served]).then(() => {
    // A client that has every byte may close before the read that finds the file's end is back, and so before `finish`.
    const whole = response.headersSent && work.bytesOut === work.length;
    work.write(response.headersSent ? response.statusCode : null, whole ? "complete" : "client_closed", endNs);
  });
});

server.on("connection", (socket) => acceptedAt.set(socket, now()));
// It ends by itself when all lines are written: of the last request, that may be after the client has all of the answer.
process.on("SIGTERM", () => server.close() && server.closeAllConnections());
server.keepAliveTimeout = 75000;
server.listen(0, "127.0.0.1", 512, () =>
  console.error(`listening on http://127.0.0.1:${server.address().port} (node-${mode}, pid ${process.pid})`),
);
