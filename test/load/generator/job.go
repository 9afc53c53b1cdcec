package generator

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Job is a load. Either URI or File names what it is put on.
type Job struct {
	URI  string // nbd+unix:///export?socket=path
	File string // path; it is read and written with pread and pwrite, by up to MaxThreads threads

	Pattern
	Connections int
	Depth       int           // requests in flight on each connection, at most MaxDepth
	Runtime     time.Duration // after which no request is made
	Structured  bool          // ask for structured replies
	Verify      bool          // check what is read; Block and Align must be multiples of 512 bytes
}

// MaxThreads is the most threads that work on a file. Each has one request in flight, so a depth needs threads.
const MaxThreads = 16

// grace is how long the replies to the last requests may take.
const grace = 30 * time.Second

// worker makes the requests of one stream.
type worker interface {
	run(clock) error
	result() *outcome
}

func (o *outcome) result() *outcome { return o }

// Run puts the load on its target until the time is over, the requests of a distinct pattern are used up, or ctx is done.
// Requests that fail are counted; the error says what kept the job from running at all.
func (j Job) Run(ctx context.Context) (_ Result, err error) {
	if j.Connections < 1 || j.Depth < 1 || j.Depth > MaxDepth || j.Runtime <= 0 {
		return Result{}, fmt.Errorf("%d connections, depth %d, %v: the depth must be 1 to %d, and nothing 0",
			j.Connections, j.Depth, j.Runtime, MaxDepth)
	}
	if (j.URI == "") == (j.File == "") {
		return Result{}, errors.New("either a URI or a file is needed")
	}
	prepare := j.connect
	if j.File != "" {
		prepare = j.open
	}
	result := Result{Connections: j.Connections, Depth: j.Depth}
	workers, release, err := prepare(&result)
	defer func() { err = errors.Join(err, release()) }()
	if err != nil {
		return Result{}, err
	}
	before, err := processorTime()
	if err != nil {
		return Result{}, err
	}
	total, err := j.runAll(ctx, workers)
	if err != nil {
		return Result{}, err
	}
	after, err := processorTime()
	result.summarize(total, j.Block, after-before)
	return result, err
}

// runAll runs every worker on a thread of its own.
func (j Job) runAll(ctx context.Context, workers []worker) (*outcome, error) {
	var wait sync.WaitGroup
	errs := make([]error, len(workers))
	begin := make(chan clock)
	for i, w := range workers {
		wait.Go(func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			if c, ok := <-begin; ok {
				errs[i] = w.run(c)
			}
		})
	}
	c := clock{time.Now(), j.Runtime}
	for range workers {
		begin <- c
	}
	// What blocks in a system call is woken by the end of its socket.
	ctx, cancel := context.WithTimeout(ctx, j.Runtime+grace)
	defer cancel()
	stop := context.AfterFunc(ctx, func() {
		for _, w := range workers {
			if c, ok := w.(*connection); ok {
				_ = unix.Shutdown(int(c.session.descriptor), unix.SHUT_RDWR)
			}
		}
	})
	wait.Wait()
	stop()
	total := &outcome{}
	for _, w := range workers {
		total.merge(w.result())
	}
	return total, errors.Join(append(errs, ctx.Err())...)
}

// connect makes a worker for each connection.
func (j Job) connect(result *Result) (workers []worker, release func() error, err error) {
	var sessions []*session
	release = func() error {
		var errs []error
		for _, s := range sessions {
			errs = append(errs, s.Close())
		}
		return errors.Join(errs...)
	}
	t, err := parseURI(j.URI)
	if err != nil {
		return nil, release, err
	}
	for i := range j.Connections {
		s, err := connect(t, j.Structured)
		if err != nil {
			return nil, release, err
		}
		sessions = append(sessions, s)
		result.Structured = s.structured
		requests, err := j.stream(s.size, i, j.Connections)
		if err != nil {
			return nil, release, err
		}
		workers = append(workers, newConnection(s, requests, j.Depth, j.Verify))
	}
	return workers, release, nil
}

// open makes a worker for each request that is to be in flight on the file.
func (j Job) open(result *Result) (workers []worker, release func() error, err error) {
	release = func() error { return nil }
	f, err := os.OpenFile(j.File, os.O_RDWR, 0)
	if err != nil {
		return nil, release, err
	}
	release = f.Close
	info, err := f.Stat()
	if err != nil {
		return nil, release, err
	}
	threads := min(j.Connections*j.Depth, MaxThreads)
	result.Connections, result.Depth = threads, 1
	for i := range threads {
		requests, err := j.stream(info.Size(), i, threads)
		if err != nil {
			return nil, release, err
		}
		w := &file{fd: int(f.Fd()), requests: requests}
		if j.Verify {
			w.ledger = newLedger(requests.begin, requests.size)
		}
		workers = append(workers, w)
	}
	return workers, release, nil
}

// stream returns the requests of one worker on a disk of so many bytes.
func (j Job) stream(disk int64, worker, workers int) (*stream, error) {
	p, err := j.resolve(disk)
	if err != nil {
		return nil, err
	}
	if j.Verify && (p.Block%blockSize != 0 || p.Align%blockSize != 0) {
		return nil, fmt.Errorf("blocks of %d bytes at multiples of %d can't be verified: only multiples of %d can",
			p.Block, p.Align, blockSize)
	}
	return newStream(p, worker, workers, j.Verify)
}

// processorTime returns the processor time that this process has taken.
func processorTime() (time.Duration, error) {
	var u unix.Rusage
	err := unix.Getrusage(unix.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano()), err
}
