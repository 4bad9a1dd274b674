// SPDX-License-Identifier: Apache-2.0

// A Bucket on net/http: a goroutine for each connection, files through the standard library, GET by http.ServeContent.
//
//	bucket -root DIR -truth FILE [-writer] [-chunk BYTES] [-verify] [-verify-reads]
//
// With -writer a PUT's body is read by its handler and written by another goroutine. With -chunk a buffer of that size is filled
// before it is hashed and written. With -verify each artifact is read back after storing it, with -verify-reads before a GET with
// `digest=` is answered. A client's header X-Test-Hide has an upload stored whatever its digest is; X-Test-Corrupt-Stored has a bit
// of the stored file flipped before it is read back.
//
// The step `digest` is wall time around each call of the hash, `digest_cpu` the CPU time of the thread meanwhile, to which the
// goroutine is locked for that: what the thread spent there, with whatever an observer's probes cost it. The cost of the clocks,
// measured at the start, is taken away.
package main

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"sort"
	"strings"
	"sync"
	"syscall"
	"time"
	"unsafe"
)

const (
	chunk          = 64 << 10
	chunksInFlight = 4
	clockMonotonic = 1
	clockThreadCPU = 3
	tries          = 2000
)

// --- the clock ---

// startNs is CLOCK_MONOTONIC at startTime. Go's own clock is the same, but shows only differences.
var startTime, startNs = readClocks()

func readClocks() (time.Time, int64) {
	var spec syscall.Timespec
	before := time.Now()
	syscall.Syscall(syscall.SYS_CLOCK_GETTIME, clockMonotonic, uintptr(unsafe.Pointer(&spec)), 0)
	return before.Add(time.Since(before) / 2), spec.Nano()
}

func now() int64 { return startNs + int64(time.Since(startTime)) }

// threadCPU is the CPU time of this thread in ns. RawSyscall, since it never blocks.
func threadCPU() int64 {
	var spec syscall.Timespec
	syscall.RawSyscall(syscall.SYS_CLOCK_GETTIME, clockThreadCPU, uintptr(unsafe.Pointer(&spec)), 0)
	return spec.Nano()
}

// --- digests ---

// hashing makes one call that hashes so many bytes, and adds it to the line's steps.
func (l *line) hashing(bytes int, call func()) {
	wall, cpu := stopwatch(call)
	l.addNs("digest", wall-clocksWall, int64(bytes))
	l.addNs("digest_cpu", cpu-clocksCPU, int64(bytes))
}

// stopwatch gives the wall time of a call and the CPU time of its thread, with the cost of taking them.
func stopwatch(call func()) (wall, cpu int64) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	beginCPU := threadCPU()
	begin := now()
	call()
	wall = now() - begin
	return wall, threadCPU() - beginCPU
}

// What a call that does nothing seems to take, in ns.
var clocksWall, clocksCPU = costOfClocks()

func costOfClocks() (wall, cpu int64) {
	walls, cpus := make([]int64, tries), make([]int64, tries)
	for i := range walls {
		other := sha256.New()
		walls[i], cpus[i] = stopwatch(func() { other.Write(nil) })
	}
	return median(walls), median(cpus)
}

func median(times []int64) int64 {
	sort.Slice(times, func(i, j int) bool { return times[i] < times[j] })
	return times[len(times)/2]
}

// timedHash is a hash whose calls are steps of the line.
type timedHash struct {
	hash.Hash
	line *line
}

func (h *timedHash) Write(part []byte) (size int, err error) {
	h.line.hashing(len(part), func() { size, err = h.Hash.Write(part) })
	return size, err
}

// finish gives the digest as the contract writes it.
func (h *timedHash) finish() string {
	var sum []byte
	h.line.hashing(0, func() { sum = h.Hash.Sum(nil) })
	return "sha256:" + hex.EncodeToString(sum)
}

// filled reads whole buffers, but for the last one.
type filled struct{ io.Reader }

func (f filled) Read(part []byte) (int, error) {
	size, err := io.ReadFull(f.Reader, part)
	if err == io.ErrUnexpectedEOF {
		err = io.EOF
	}
	return size, err
}

// --- what a request did ---

type step struct {
	Step  string `json:"step"`
	Ns    int64  `json:"ns"`
	Bytes int64  `json:"bytes"`
	Calls int64  `json:"calls"`
}

// counts are the calls that succeeded; nil is what the program cannot know.
type counts struct {
	Opens      int64  `json:"opens"`
	WriteCalls int64  `json:"write_calls"`
	WriteBytes int64  `json:"write_bytes"`
	ReadCalls  *int64 `json:"read_calls"`
	ReadBytes  int64  `json:"read_bytes"`
	Syncs      int64  `json:"syncs"`
	Renames    int64  `json:"renames"`
}

// line is a line of truth.
type line struct {
	RequestID     string  `json:"request_id"`
	Pid           int     `json:"pid"`
	Tid           *int    `json:"tid"`
	Method        string  `json:"method"`
	TargetPath    string  `json:"target_path"`
	Status        *int    `json:"status"` // nil where no answer was begun
	Outcome       string  `json:"outcome"`
	BytesIn       int64   `json:"bytes_in"`
	BytesOut      int64   `json:"bytes_out"`
	BeginNs       int64   `json:"begin_ns"`
	AcceptNs      int64   `json:"accept_ns"`
	EndNs         *int64  `json:"end_ns"`
	Steps         []*step `json:"steps"`
	Files         counts  `json:"files"`
	MetadataFiles counts  `json:"metadata_files"`

	Computed string   `json:"computed,omitempty"` // the digest of the body
	Verified []string `json:"verified,omitempty"` // of each digest of what was read back: match or mismatch
}

// add puts one call into a step. The goroutines of one request never add at the same time.
func (l *line) add(name string, beginNs, bytes int64) { l.addNs(name, now()-beginNs, bytes) }

func (l *line) addNs(name string, ns, bytes int64) {
	if ns < 0 {
		ns = 0
	}
	for _, known := range l.Steps {
		if known.Step == name {
			known.Ns += ns
			known.Bytes += bytes
			known.Calls++
			return
		}
	}
	l.Steps = append(l.Steps, &step{name, ns, bytes, 1})
}

// file is an open file whose calls are counted, as data or as metadata.
type file struct {
	*os.File
	line *line
	is   kind
}

// kind says where calls are counted, and which steps they are.
type kind struct {
	counts func(*line) *counts
	step   func(call string) string
}

var dataSteps = map[string]string{"write": "storage_write", "read": "storage_read", "sync": "storage_sync"}

var (
	data = kind{func(l *line) *counts { return &l.Files }, func(call string) string {
		if step, known := dataSteps[call]; known {
			return step
		}
		return call
	}}
	metadata = kind{func(l *line) *counts { return &l.MetadataFiles }, func(string) string { return "metadata" }}
)

func (k kind) openFile(l *line, path string, flags int) (*file, error) {
	begin := now()
	opened, err := os.OpenFile(path, flags, 0o644)
	l.add(k.step("open"), begin, 0)
	if err != nil {
		return nil, err
	}
	k.counts(l).Opens++
	return &file{opened, l, k}, nil
}

func (k kind) renameFile(l *line, source, target string) error {
	begin := now()
	err := os.Rename(source, target)
	l.add(k.step("rename"), begin, 0)
	if err == nil {
		k.counts(l).Renames++
	}
	return err
}

func (k kind) makeFolder(l *line, path string) error {
	begin := now()
	defer func() { l.add(k.step("mkdir"), begin, 0) }()
	return os.MkdirAll(path, 0o755)
}

func (k kind) remove(l *line, path string) error {
	begin := now()
	defer func() { l.add(k.step("unlink"), begin, 0) }()
	return os.Remove(path)
}

// list gives the paths that a pattern names. That a folder is opened for this is not counted: it is no file.
func (k kind) list(l *line, pattern string) ([]string, error) {
	begin := now()
	defer func() { l.add(k.step("list"), begin, 0) }()
	return filepath.Glob(pattern)
}

// Write hides os.File's ReadFrom from io.Copy, which then writes what it read. A regular file takes it all in one call.
func (f *file) Write(part []byte) (int, error) {
	begin := now()
	size, err := f.File.Write(part)
	f.line.add(f.is.step("write"), begin, int64(size))
	if err == nil {
		f.is.counts(f.line).WriteCalls++
	}
	f.is.counts(f.line).WriteBytes += int64(size)
	return size, err
}

func (f *file) ReadFrom(source io.Reader) (int64, error) {
	return io.Copy(struct{ io.Writer }{f}, source)
}

func (f *file) Read(part []byte) (int, error) {
	begin := now()
	size, err := f.File.Read(part)
	f.line.add(f.is.step("read"), begin, int64(size))
	if err == nil || err == io.EOF {
		*f.is.counts(f.line).ReadCalls++
	}
	f.is.counts(f.line).ReadBytes += int64(size)
	return size, err
}

func (f *file) Close() error {
	begin := now()
	err := f.File.Close()
	f.line.add(f.is.step("close"), begin, 0)
	return err
}

func (f *file) Sync() error {
	begin := now()
	err := f.File.Sync()
	f.line.add(f.is.step("sync"), begin, 0)
	if err == nil {
		f.is.counts(f.line).Syncs++
	}
	return err
}

// --- the store ---

type document struct {
	BucketID         string `json:"bucket_id"`
	ArtifactID       string `json:"artifact_id"`
	Version          string `json:"version"`
	Digest           string `json:"digest"`
	SizeBytes        int64  `json:"size_bytes"`
	CreatedAt        string `json:"created_at"`
	UploadedBy       string `json:"uploaded_by"`
	ProvenanceSource string `json:"provenance_source"`
}

func (d *document) name() string { return filepath.Join(d.BucketID, d.ArtifactID, d.Version) }

// problem is an error that gets an answer of its own.
type problem struct {
	status int
	code   string
}

func (p problem) Error() string { return p.code }

type store struct {
	root          string
	withWriter    bool
	chunk         int // 0: as io.Copy has it
	verifies      bool
	verifiesReads bool
	mutex         sync.Mutex
	truth         *os.File
	unwritten     sync.WaitGroup // lines
}

func (s *store) sidecar(name string) string { return filepath.Join(s.root, "meta", name+".json") }

func (s *store) find(l *line, path string) (*document, error) {
	opened, err := metadata.openFile(l, path, os.O_RDONLY)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer opened.Close()
	text := make([]byte, chunk)
	size, err := opened.Read(text)
	if err != nil {
		return nil, err
	}
	found := &document{}
	return found, json.Unmarshal(text[:size], found)
}

func uuid() string {
	bytes := make([]byte, 16)
	if _, err := rand.Read(bytes); err != nil {
		panic(err)
	}
	return hex.EncodeToString(bytes)
}

func (s *store) put(l *line, request *http.Request, bucket, artifact string) (int, *document, error) {
	header := request.Header
	wanted := &document{
		BucketID: bucket, ArtifactID: artifact, Version: header.Get("X-Artifact-Version"),
		Digest:     strings.ToLower(header.Get("X-Artifact-Digest")),
		UploadedBy: header.Get("X-Uploaded-By"), ProvenanceSource: header.Get("X-Provenance-Source"),
	}
	if wanted.Version == "" || wanted.Digest == "" || wanted.UploadedBy == "" || wanted.ProvenanceSource == "" {
		return 0, nil, problem{400, "missing_header"}
	}
	temporary := filepath.Join(s.root, "tmp", uuid())
	opened, err := data.openFile(l, temporary, os.O_WRONLY|os.O_CREATE|os.O_EXCL)
	if err != nil {
		return 0, nil, err
	}
	stored := false
	defer func() {
		opened.Close()
		if !stored {
			data.remove(l, temporary)
		}
	}()
	hash := &timedHash{Hash: sha256.New(), line: l}
	receive := s.receiveAndWrite
	if s.withWriter {
		receive = s.receiveForWriter
	}
	if wanted.SizeBytes, err = receive(opened, io.TeeReader(s.pieces(request.Body), hash)); err != nil {
		return 0, nil, err
	}
	l.Computed = hash.finish()
	if wanted.Digest != l.Computed && header.Get("X-Test-Hide") == "" {
		return 0, nil, problem{400, "digest_mismatch"}
	}
	if err := opened.Sync(); err != nil {
		return 0, nil, err
	}
	existing, err := s.find(l, s.sidecar(wanted.name()))
	if err != nil {
		return 0, nil, err
	}
	if existing != nil {
		if existing.Digest != wanted.Digest {
			return 0, nil, problem{409, "version_conflict"}
		}
		return 200, existing, nil
	}
	wanted.CreatedAt = time.Now().UTC().Format(time.RFC3339Nano)
	err = s.keep(l, temporary, wanted, header.Get("X-Test-Corrupt-Stored") != "")
	stored = err == nil
	return 201, wanted, err
}

// pieces is the body in pieces as they are to be hashed and written.
func (s *store) pieces(body io.Reader) io.Reader {
	if s.chunk == 0 {
		return body
	}
	return filled{body}
}

func (s *store) receiveAndWrite(target *file, body io.Reader) (int64, error) {
	if s.chunk == 0 {
		return io.Copy(target, body)
	}
	return io.CopyBuffer(struct{ io.Writer }{target}, body, make([]byte, s.chunk))
}

// receiveForWriter reads in this goroutine and writes in another one.
func (s *store) receiveForWriter(target *file, body io.Reader) (int64, error) {
	parts, done := make(chan []byte, chunksInFlight), make(chan error, 1)
	go func() {
		var failed error
		for part := range parts {
			if failed == nil {
				_, failed = target.Write(part)
			}
		}
		done <- failed
	}()
	var total int64
	var failed error
	for failed == nil {
		part := make([]byte, s.pieceSize())
		var size int
		size, failed = body.Read(part)
		if size > 0 {
			parts <- part[:size]
			total += int64(size)
		}
	}
	close(parts)
	written := <-done
	if failed != io.EOF {
		return total, failed
	}
	return total, written
}

func (s *store) pieceSize() int {
	if s.chunk == 0 {
		return chunk
	}
	return s.chunk
}

// verify reads a stored file back and tells in the truth whether it has the digest; it fails where it has not.
func (s *store) verify(l *line, path, digest string) error {
	opened, err := data.openFile(l, path, os.O_RDONLY)
	if err != nil {
		return err
	}
	defer opened.Close()
	hash := &timedHash{Hash: sha256.New(), line: l}
	if _, err := io.CopyBuffer(hash, struct{ io.Reader }{opened}, make([]byte, s.pieceSize())); err != nil {
		return err
	}
	if hash.finish() != digest {
		l.Verified = append(l.Verified, "mismatch")
		return problem{500, "post_storage_mismatch"}
	}
	l.Verified = append(l.Verified, "match")
	return nil
}

// corrupt flips a bit of the byte in the middle, by calls that are not counted.
func corrupt(path string) error {
	opened, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer opened.Close()
	about, err := opened.Stat()
	if err != nil {
		return err
	}
	part := make([]byte, 1)
	if _, err := opened.ReadAt(part, about.Size()/2); err != nil {
		return err
	}
	part[0] ^= 1
	_, err = opened.WriteAt(part, about.Size()/2)
	return err
}

// keep moves a finished upload to its place, and writes its metadata.
func (s *store) keep(l *line, source string, wanted *document, corrupts bool) error {
	target, sidecar := filepath.Join(s.root, "data", wanted.name()), s.sidecar(wanted.name())
	if err := data.makeFolder(l, filepath.Dir(target)); err != nil {
		return err
	}
	if err := metadata.makeFolder(l, filepath.Dir(sidecar)); err != nil {
		return err
	}
	if err := data.renameFile(l, source, target); err != nil {
		return err
	}
	if corrupts {
		if err := corrupt(target); err != nil {
			return err
		}
	}
	if s.verifies {
		if err := s.verify(l, target, l.Computed); err != nil {
			data.remove(l, target)
			return err
		}
	}
	text, err := json.Marshal(wanted)
	if err != nil {
		return err
	}
	temporary := filepath.Join(s.root, "meta", uuid()+".tmp")
	opened, err := metadata.openFile(l, temporary, os.O_WRONLY|os.O_CREATE|os.O_EXCL)
	if err != nil {
		return err
	}
	defer opened.Close()
	if _, err := opened.Write(text); err != nil {
		return err
	}
	if err := opened.Sync(); err != nil {
		return err
	}
	return metadata.renameFile(l, temporary, sidecar)
}

func (s *store) versions(l *line, bucket, artifact string) ([]map[string]any, error) {
	paths, err := metadata.list(l, filepath.Join(s.root, "meta", bucket, artifact, "*.json"))
	found := []map[string]any{}
	for _, path := range paths {
		one, err := s.find(l, path)
		if err != nil {
			return nil, err
		}
		found = append(found, map[string]any{
			"version": one.Version, "digest": one.Digest, "size_bytes": one.SizeBytes, "created_at": one.CreatedAt,
		})
	}
	return found, err
}

// --- HTTP ---

// conn is a connection that knows when it was accepted and when it was last given something to send, which net/http may do
// long after the handler.
type conn struct {
	*net.TCPConn
	acceptNs, sentNs int64
	failed           bool
	line             *line // of the request whose handler is done
}

func (c *conn) Write(part []byte) (int, error) {
	size, err := c.TCPConn.Write(part)
	c.note(err)
	return size, err
}

// ReadFrom is what sendfile(2) is behind.
func (c *conn) ReadFrom(source io.Reader) (int64, error) {
	size, err := c.TCPConn.ReadFrom(source)
	c.note(err)
	return size, err
}

func (c *conn) note(err error) {
	c.sentNs = now()
	c.failed = c.failed || err != nil
}

type listener struct{ *net.TCPListener }

func (l listener) Accept() (net.Conn, error) {
	accepted, err := l.AcceptTCP()
	if err != nil {
		return nil, err
	}
	return &conn{TCPConn: accepted, acceptNs: now()}, nil
}

type connKey struct{}

// answer counts the bytes of an answer's body. Its ReadFrom is what lets http.ServeContent use sendfile(2).
type answer struct {
	http.ResponseWriter
	status int
	bytes  int64
}

func (a *answer) WriteHeader(status int) {
	a.status = status
	a.ResponseWriter.WriteHeader(status)
}

func (a *answer) Write(part []byte) (int, error) {
	size, err := a.ResponseWriter.Write(part)
	a.bytes += int64(size)
	return size, err
}

func (a *answer) ReadFrom(source io.Reader) (int64, error) {
	size, err := a.ResponseWriter.(io.ReaderFrom).ReadFrom(source)
	a.bytes += size
	return size, err
}

func (a *answer) document(status int, content any) {
	text, err := json.Marshal(content)
	if err != nil {
		panic(err)
	}
	a.Header().Set("Content-Type", "application/json")
	a.WriteHeader(status)
	a.Write(text)
}

// body counts the bytes of a request's body.
type body struct {
	io.ReadCloser
	line *line
}

func (b body) Read(part []byte) (int, error) {
	size, err := b.ReadCloser.Read(part)
	b.line.BytesIn += int64(size)
	if err != nil && err != io.EOF {
		b.line.Outcome = "client_closed"
	}
	return size, err
}

func (s *store) ServeHTTP(writer http.ResponseWriter, request *http.Request) {
	connection := request.Context().Value(connKey{}).(*conn)
	l := &line{
		RequestID: request.Header.Get("X-Request-ID"), Pid: os.Getpid(), Method: request.Method, TargetPath: request.URL.Path,
		Outcome: "complete", BeginNs: now(), AcceptNs: connection.acceptNs, Steps: []*step{},
	}
	l.Files.ReadCalls, l.MetadataFiles.ReadCalls = new(int64), new(int64)
	request.Body = body{request.Body, l}
	reply := &answer{ResponseWriter: writer}
	err := s.serve(l, reply, request)
	if l.Outcome == "complete" && err != nil {
		var known problem
		if !errors.As(err, &known) {
			log.Print(err)
			known = problem{500, "storage_error"}
		}
		reply.document(known.status, map[string]any{"error": map[string]any{"code": known.code, "message": known.code, "details": map[string]any{}}})
	}
	if reply.status != 0 {
		l.Status = &reply.status
	}
	l.BytesOut = reply.bytes
	s.unwritten.Add(1)
	connection.line = l
	if l.Status == nil {
		panic(http.ErrAbortHandler) // nobody is left to answer
	}
}

// changed hears of a connection that waits for the next request or is closed: then all of the answer was sent.
func (s *store) changed(accepted net.Conn, state http.ConnState) {
	connection := accepted.(*conn)
	if connection.line == nil || (state != http.StateIdle && state != http.StateClosed) {
		return
	}
	if end := connection.sentNs; connection.line.Status != nil {
		connection.line.EndNs = &end
	}
	if connection.failed {
		connection.line.Outcome = "client_closed"
	}
	s.write(connection.line)
	connection.line = nil
	s.unwritten.Done()
}

func (s *store) serve(l *line, reply *answer, request *http.Request) error {
	parts := strings.Split(request.URL.Path, "/")
	if len(parts) < 4 || len(parts) > 5 || parts[1] != "v1" || (len(parts) == 5 && parts[4] != "versions") {
		return problem{404, "unknown_route"}
	}
	bucket, artifact := parts[2], parts[3]
	switch {
	case len(parts) == 5:
		found, err := s.versions(l, bucket, artifact)
		if err == nil {
			reply.document(200, map[string]any{"versions": found})
		}
		return err
	case request.Method == http.MethodPut:
		status, found, err := s.put(l, request, bucket, artifact)
		if err == nil {
			reply.document(status, found)
		}
		return err
	case request.Method == http.MethodGet:
		return s.get(l, reply, request, bucket, artifact)
	}
	return problem{405, "method_not_allowed"}
}

func (s *store) get(l *line, reply *answer, request *http.Request, bucket, artifact string) error {
	query := request.URL.Query()
	wanted := &document{BucketID: bucket, ArtifactID: artifact, Version: query.Get("version")}
	found, err := s.find(l, s.sidecar(wanted.name()))
	if err != nil {
		return err
	}
	if found == nil {
		return problem{404, "not_found"}
	}
	if digest := query.Get("digest"); digest != "" && !strings.EqualFold(digest, found.Digest) {
		return problem{412, "digest_precondition_failed"}
	}
	if query.Get("metadata_only") == "true" {
		reply.document(200, found)
		return nil
	}
	path := filepath.Join(s.root, "data", found.name())
	if s.verifiesReads && query.Get("digest") != "" {
		if err := s.verify(l, path, found.Digest); err != nil {
			return err
		}
	}
	opened, err := data.openFile(l, path, os.O_RDONLY)
	if err != nil {
		return err
	}
	defer opened.Close()
	reply.Header().Set("Content-Type", "application/octet-stream")
	// The bare file: with anything around it net/http would copy, and not use sendfile(2). So its reads are not counted.
	http.ServeContent(reply, request, "", time.Time{}, opened.File)
	l.Files.ReadBytes += reply.bytes
	l.Files.ReadCalls = nil
	return nil
}

func (s *store) write(l *line) {
	text, err := json.Marshal(l)
	if err != nil {
		panic(err)
	}
	s.mutex.Lock()
	defer s.mutex.Unlock()
	if _, err := s.truth.Write(append(text, '\n')); err != nil {
		log.Fatal(err)
	}
}

func main() {
	root := flag.String("root", "", "storage root")
	truth := flag.String("truth", "", "file of the truth")
	withWriter := flag.Bool("writer", false, "write in another goroutine than the one that reads the body")
	size := flag.Int("chunk", 0, "bytes that are hashed and written at a time")
	verifies := flag.Bool("verify", false, "read each artifact back after storing it")
	verifiesReads := flag.Bool("verify-reads", false, "and before a GET with a digest is answered")
	flag.Parse()
	file, err := os.OpenFile(*truth, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		log.Fatal(err)
	}
	listening, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		log.Fatal(err)
	}
	stored := &store{
		root: *root, withWriter: *withWriter, chunk: *size, verifies: *verifies, verifiesReads: *verifiesReads, truth: file,
	}
	server := &http.Server{
		Handler:   stored,
		ConnState: stored.changed,
		ConnContext: func(parent context.Context, accepted net.Conn) context.Context {
			return context.WithValue(parent, connKey{}, accepted)
		},
	}
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM, os.Interrupt)
	go func() {
		if err := server.Serve(listener{listening}); err != http.ErrServerClosed {
			log.Fatal(err)
		}
	}()
	fmt.Fprintf(os.Stderr, "listening on http://%s (go, pid %d)\n", listening.Addr(), os.Getpid())
	<-stop
	server.Close()
	stored.unwritten.Wait()
}
