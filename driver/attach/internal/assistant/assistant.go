// Package assistant does in a process of its own what this process must not do itself: wait for a device that it serves.
//
// A thread that waits for I/O to a device, or for a file of a FUSE mount, cannot be killed. If the device is served
// by the same process, that is a trap: when the process is killed, nobody answers any more, the thread does not die,
// and the kernel, which would end the waiting once the server is dead, regards the process as alive until its last
// thread has gone. So flushing, opening and the like is a [Task], carried out by this program once more, as a
// short-lived child. When the server is killed, its assistants get an error, and end too.
//
// A task is the value of a package's variable. A process that was started as an assistant carries out its task when the
// variable is initialized, and never gets as far as main.
package assistant

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"time"

	"golang.org/x/sys/unix"

	"github.com/qcow-csi/qcow-csi/driver/attach"
)

// argv0 is what a process of this program is called when it is an assistant. There is no such file.
const argv0 = "qcow-csi-assistant"

// FirstFile is the descriptor by which an assistant has the first of the files that it was given.
const FirstFile = 3

// Task is something to do in a process of its own. Jobs and results travel as JSON.
type Task[Job, Result any] struct{ name string }

// report is what an assistant answers.
type report[Result any] struct {
	Result Result
	Busy   bool   // the error is attach.ErrBusy
	Error  string // "" for none
}

// New returns the task with this name, unique in the program. In an assistant that was started for it New does not
// return.
func New[Job, Result any](name string, do func(context.Context, Job) (Result, error)) Task[Job, Result] {
	if len(os.Args) == 2 && os.Args[0] == argv0 && os.Args[1] == name {
		status := 0
		if err := serve(do); err != nil {
			fmt.Fprintln(os.Stderr, err)
			status = 1
		}
		unix.Exit(status) // not os.Exit, which takes a second under the race detector
	}
	return Task[Job, Result]{name}
}

func serve[Job, Result any](do func(context.Context, Job) (Result, error)) error {
	var job Job
	if err := json.NewDecoder(os.Stdin).Decode(&job); err != nil {
		return err
	}
	result, err := do(context.Background(), job)
	r := report[Result]{Result: result}
	if err != nil {
		r.Busy, r.Error = errors.Is(err, attach.ErrBusy), err.Error()
	}
	return json.NewEncoder(os.Stdout).Encode(r)
}

// Run has an assistant do the job, with some files. Of its error's classes only attach.ErrBusy is kept. When ctx ends the
// assistant is killed; Run returns when it is dead, so that it is known what it has done.
func (t Task[Job, Result]) Run(ctx context.Context, job Job, files ...*os.File) (Result, error) {
	var (
		r                 report[Result]
		answer, complaint bytes.Buffer
	)
	order, err := json.Marshal(job)
	if err != nil {
		return r.Result, err
	}
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Args = []string{argv0, t.name}
	cmd.Stdin, cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = bytes.NewReader(order), &answer, &complaint, files
	cmd.WaitDelay = time.Second
	err = cmd.Run()
	if err == nil {
		err = json.Unmarshal(answer.Bytes(), &r)
	}
	switch {
	case ctx.Err() != nil:
		return r.Result, ctx.Err()
	case err != nil:
		return r.Result, fmt.Errorf("assistant process for %s: %w: %s", t.name, err, bytes.TrimSpace(complaint.Bytes()))
	case r.Busy:
		return r.Result, busyError(r.Error)
	case r.Error != "":
		return r.Result, errors.New(r.Error)
	}
	return r.Result, nil
}

// busyError is the text of an error that matched attach.ErrBusy.
type busyError string

func (e busyError) Error() string        { return string(e) }
func (e busyError) Is(target error) bool { return target == attach.ErrBusy }
