package nbdexport

import "golang.org/x/sys/unix"

// pipe carries the data of a reply from the page cache to a socket without copying it.
type pipe struct{ in, out int }

const (
	// pipeSize is the room of a pipe in bytes: of pages, some of which may be in use only in part.
	pipeSize = 1 << 20
	// longestSplice is how many bytes a pipe takes wherever they begin.
	longestSplice = pipeSize
	// shortestSplice is how many bytes are worth the system calls.
	shortestSplice = 32 << 10
)

// pipes are the idle ones: enough for what a few busy connections have at work.
var pipes = make(chan *pipe, 32)

// takePipe returns an empty pipe, or nil where there is none to be had.
func takePipe() *pipe {
	select {
	case p := <-pipes:
		return p
	default:
		return newPipe()
	}
}

func newPipe() *pipe {
	var fds [2]int
	if unix.Pipe2(fds[:], unix.O_CLOEXEC) != nil {
		return nil
	}
	p := &pipe{out: fds[0], in: fds[1]}
	if n, err := unix.FcntlInt(uintptr(p.in), unix.F_SETPIPE_SZ, pipeSize); err != nil || n < pipeSize {
		p.close()
		return nil
	}
	return p
}

// recycle makes an empty pipe idle.
func (p *pipe) recycle() {
	select {
	case pipes <- p:
	default:
		p.close()
	}
}

func (p *pipe) close() {
	_ = unix.Close(p.in) // nothing is lost that anybody waits for
	_ = unix.Close(p.out)
}

// drain reads n bytes that are in the pipe.
func (p *pipe) drain(b []byte) error {
	for len(b) > 0 {
		n, err := unix.Read(p.out, b)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return err
		default:
			b = b[n:]
		}
	}
	return nil
}
