package interop_test

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
)

// session is a qemu-io that does what it is told, for one image after the other.
type session struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out io.ReadCloser
}

const prompt = "qemu-io> "

// session returns one that nobody uses.
func (b *bench) session() (*session, error) {
	select {
	case s := <-b.sessions:
		return s, nil
	default:
	}
	s := &session{cmd: exec.Command("qemu-io", secretObject...)}
	s.cmd.Dir = b.dir
	in, err := s.cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, both, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	s.in, s.out, s.cmd.Stdout, s.cmd.Stderr = in, out, both, both
	if err := errors.Join(b.start(s.cmd), both.Close()); err != nil {
		return nil, err
	}
	_, err = s.answer()
	return s, err
}

// answer returns what qemu-io says until it wants to hear something.
func (s *session) answer() (string, error) {
	var said []byte
	buffer := make([]byte, 4096)
	for {
		n, err := s.out.Read(buffer)
		said = append(said, buffer[:n]...)
		if text, ok := strings.CutSuffix(string(said), prompt); ok {
			return text, nil
		}
		if err != nil {
			return "", fmt.Errorf("qemu-io has ended: %w\n%s", err, said)
		}
	}
}

// tell gives a command that has nothing to say when it succeeds.
func (s *session) tell(command string) error {
	if _, err := io.WriteString(s.in, command+"\n"); err != nil {
		return err
	}
	said, err := s.answer()
	if err == nil && said != "" {
		err = fmt.Errorf("qemu-io %q: %s", command, said)
	}
	return err
}

// end ends the program.
func (s *session) end() {
	_ = s.in.Close() // it has nothing open, and ends now
	_ = s.cmd.Wait()
	_ = s.out.Close()
}
