package main

import (
	"encoding/json"
	"fmt"
	"os"

	"github.com/cheggaaa/pb/v3"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// progressFlags are how a command that takes long tells how far it is.
type progressFlags struct {
	bar bool
	fd  int
}

// addProgressFlags adds the flags of a command that takes long.
func addProgressFlags(cmd *cobra.Command) *progressFlags {
	p := progressFlags{fd: -1}
	cmd.Flags().BoolVarP(&p.bar, "progress", "p", false, "show a progress bar; on a terminal there is one anyway, unless --progress=false")
	cmd.Flags().IntVar(&p.fd, "progress-fd", p.fd, `file descriptor for progress to be read by programs: {"done": 1, "total": 4, "fraction": 0.25}, one on each line`)
	return &p
}

// meter tells how far an operation is. Its methods are called from one goroutine at a time.
type meter struct {
	bar     *pb.ProgressBar // nil: none
	started bool
	lines   *os.File // nil: none
	total   int64    // of the last update
	shown   int64    // thousandths that the last line told; -1: there was none
}

// meter returns a meter for an operation whose progress is counted in bytes or in something else.
func (p *progressFlags) meter(cmd *cobra.Command, bytes bool) (*meter, error) {
	m := &meter{shown: -1}
	if cmd.Flags().Changed("progress-fd") {
		var err error
		if m.lines, err = openDescriptor(p.fd); err != nil {
			return nil, fmt.Errorf("--progress-fd %d: %w", p.fd, err)
		}
	}
	quiet, err := cmd.Flags().GetBool("quiet")
	if err != nil {
		return nil, err
	}
	terminal, ok := cmd.ErrOrStderr().(*os.File)
	onTerminal := ok && isTerminal(terminal)
	if p.bar || onTerminal && !quiet && !cmd.Flags().Changed("progress") {
		m.bar = pb.New64(0).Set(pb.Bytes, bytes).SetTemplate(pb.Full).SetWriter(cmd.ErrOrStderr())
		if !onTerminal {
			m.bar.Set(pb.ReturnSymbol, "\r").SetWidth(79)
		}
	}
	return m, nil
}

// update says how much of how much is done. It is safe to pass to the engine: it never fails.
func (m *meter) update(done, total int64) {
	m.total = total
	if m.bar != nil {
		m.bar.SetTotal(total).SetCurrent(done)
		if !m.started {
			m.started = true
			m.bar.Start()
		}
	}
	m.line(done, total)
}

// progressLine is what a line of --progress-fd says.
type progressLine struct {
	Done     int64   `json:"done"`
	Total    int64   `json:"total"`
	Fraction float64 `json:"fraction"`
}

// line writes a line whenever another thousandth is done.
func (m *meter) line(done, total int64) {
	l := progressLine{Done: done, Total: total, Fraction: 1}
	if total > 0 {
		l.Fraction = float64(done) / float64(total)
	}
	thousandths := int64(l.Fraction * 1000)
	if m.lines == nil || thousandths == m.shown {
		return
	}
	m.shown = thousandths
	b, err := json.Marshal(l)
	if err == nil {
		_, err = m.lines.Write(append(b, '\n'))
	}
	if err != nil { // nobody is listening any more, which is no reason to stop
		m.closeLines()
	}
}

// finish says that all is done, whatever was left to do, and ends the display.
func (m *meter) finish() {
	if m.started {
		m.bar.SetCurrent(m.total)
	}
	m.line(m.total, m.total)
	m.stop()
}

// stop ends the display; again it does nothing.
func (m *meter) stop() {
	if m.started {
		m.started = false
		m.bar.Finish()
	}
	m.closeLines()
}

func (m *meter) closeLines() {
	if m.lines != nil {
		m.lines.Close() //nolint:errcheck // nothing is buffered, and every write was looked at
		m.lines = nil
	}
}

// openDescriptor returns a copy of a descriptor that this process was started with, for writing.
func openDescriptor(fd int) (*os.File, error) {
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	if err != nil {
		return nil, err
	}
	if flags&unix.O_ACCMODE == unix.O_RDONLY {
		return nil, fmt.Errorf("it is open for reading: %w", unix.EBADF)
	}
	own, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(own), "progress"), nil
}

func isTerminal(f *os.File) bool {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}
