package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os/exec"
	"strings"

	"github.com/qcow-csi/qcow-csi/test/qemucrash/judge"
	"github.com/qcow-csi/qcow-csi/test/qemucrash/recording"
)

// chances says how many of 100 requests are no writes and no flushes.
type chances struct{ zero, discard int }

const (
	flushes = 18 // of 100 requests
	asked   = 60 // requests
)

// requests makes up what a guest asks for: mostly of the places where the shape has data, and their neighbours.
func requests(st *stage, c chances) []judge.Request {
	s := st.shape
	rng := rand.New(rand.NewPCG(st.seed, 2))
	var asks []judge.Request
	value := byte(firstRequest)
	for range asked {
		layer := s.layers[rng.IntN(len(s.layers))]
		near := layer[rng.IntN(len(layer))]
		n := (1 + rng.Int64N(3*s.cluster/512)) * 512
		off := near.off + rng.Int64N(2*near.n/512)*512
		off = min(off, s.size-n)
		switch dice := rng.IntN(100); {
		case dice < flushes:
			asks = append(asks, judge.Request{Kind: judge.Flush})
		case dice < flushes+c.zero:
			asks = append(asks, judge.Request{Kind: judge.Write, Offset: off, Length: n})
		case dice < flushes+c.zero+c.discard:
			// Whole clusters: what QEMU makes of others is its own business.
			off, n = off/s.cluster*s.cluster, (1+2*(n/s.cluster))*s.cluster
			asks = append(asks, judge.Request{Kind: judge.Discard, Offset: off, Length: min(n, s.size-off)})
		default:
			asks = append(asks, judge.Request{Kind: judge.Write, Offset: off, Length: n, Value: value})
			value = firstRequest + (value-firstRequest+1)%(lastRequest-firstRequest+1)
		}
	}
	return asks
}

// spell says a request in qemu-io's language.
func spell(r judge.Request) string {
	switch {
	case r.Kind == judge.Flush:
		return "flush"
	case r.Kind == judge.Discard:
		return fmt.Sprintf("discard %d %d", r.Offset, r.Length)
	case r.Value == 0:
		return fmt.Sprintf("write -z %d %d", r.Offset, r.Length)
	}
	return fmt.Sprintf("write -P %d %d %d", r.Value, r.Offset, r.Length)
}

// ask starts qemu-io, gives it one request after the other, and notes how far the log has come with each answer.
func ask(cmd *exec.Cmd, log *recording.Log, requests []judge.Request) (_ []judge.Request, err error) {
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	answers := bufio.NewReader(out)
	done, talk := converse(in, answers, log, requests)
	_, rest := io.Copy(io.Discard, answers)
	if err := errors.Join(talk, in.Close(), rest, cmd.Wait()); err != nil {
		return nil, fmt.Errorf("qemu-io: %w: %s", err, stderr.String())
	}
	return done, nil
}

func converse(in io.Writer, answers *bufio.Reader, log *recording.Log, requests []judge.Request) ([]judge.Request, error) {
	if _, err := answer(answers); err != nil {
		return nil, err
	}
	var done []judge.Request
	for _, r := range requests {
		r.Start = len(log.Ops)
		if _, err := fmt.Fprintln(in, spell(r)); err != nil {
			return nil, err
		}
		said, err := answer(answers)
		if err != nil {
			return nil, err
		}
		if strings.Contains(said, "failed") {
			return nil, errors.New(said)
		}
		if err := log.Update(); err != nil {
			return nil, err
		}
		r.End = len(log.Ops)
		done = append(done, r)
	}
	_, err := fmt.Fprintln(in, "quit")
	return done, err
}

// answer reads up to the prompt.
func answer(r *bufio.Reader) (string, error) {
	const prompt = "qemu-io> "
	var said strings.Builder
	for !strings.HasSuffix(said.String(), prompt) {
		b, err := r.ReadByte()
		if err != nil {
			return said.String(), fmt.Errorf("qemu-io ended: %w", err)
		}
		said.WriteByte(b)
	}
	return strings.TrimSuffix(said.String(), prompt), nil
}
