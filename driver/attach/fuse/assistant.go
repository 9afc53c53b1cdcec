package fuse

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"time"

	"github.com/qcow-csi/qcow-csi/driver/attach"
)

// assistantName is what a process of this program is called when it is an assistant. There is no such file.
const assistantName = "qcow-csi-fuse-assistant"

// rootFD is the descriptor by which an assistant has the root directory of the mount.
const rootFD = 3

// job is what an assistant does: one of its fields.
type job struct {
	Configure *configureJob `json:",omitempty"`
	Grow      *growJob      `json:",omitempty"`
	Remove    *removeJob    `json:",omitempty"`
}

// report is how it went.
type report struct {
	Number int    // of the loop device that was configured
	Busy   bool   // the error is attach.ErrBusy
	Error  string // "" for none
}

// assist has an assistant do the job. root is the root directory of the mount, if the job needs it.
//
// What the assistant does may wait for this process to serve a request, in a way that no signal ends. Were it done by a thread of
// this process, and the process killed at that moment, the thread could not die before it has its answer, and the kernel would not
// end the connection, and thus the waiting, before the last thread is dead.
func assist(ctx context.Context, j job, root *os.File) (number int, err error) {
	order, err := json.Marshal(j)
	if err != nil {
		return 0, err
	}
	var answer, complaint bytes.Buffer
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Args = []string{assistantName}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(order), &answer, &complaint
	cmd.WaitDelay = time.Second
	if root != nil {
		cmd.ExtraFiles = []*os.File{root}
	}
	if err := cmd.Run(); err != nil {
		return 0, fmt.Errorf("assistant process: %w: %s", err, complaint.Bytes())
	}
	var r report
	if err := json.Unmarshal(answer.Bytes(), &r); err != nil {
		return 0, fmt.Errorf("assistant process: %w", err)
	}
	switch {
	case r.Busy:
		return 0, fmt.Errorf("%w: %s", attach.ErrBusy, r.Error)
	case r.Error != "":
		return 0, errors.New(r.Error)
	}
	return r.Number, nil
}

// init makes the process an assistant when it was started as one, whatever the program is otherwise.
func init() {
	if len(os.Args) == 0 || os.Args[0] != assistantName {
		return
	}
	if err := beAssistant(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

func beAssistant() error {
	var j job
	if err := json.NewDecoder(os.Stdin).Decode(&j); err != nil {
		return err
	}
	var (
		ctx = context.Background()
		r   report
		err error
	)
	switch {
	case j.Configure != nil:
		r.Number, err = j.Configure.do(ctx)
	case j.Grow != nil:
		err = j.Grow.do(ctx)
	case j.Remove != nil:
		err = j.Remove.do(ctx)
	}
	if err != nil {
		r.Busy, r.Error = errors.Is(err, attach.ErrBusy), err.Error()
	}
	return json.NewEncoder(os.Stdout).Encode(r)
}
