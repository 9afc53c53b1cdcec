package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"
)

// outputFormat is the value of --output.
type outputFormat string

const (
	outputHuman outputFormat = "human"
	outputJSON  outputFormat = "json"
)

func (o *outputFormat) String() string { return string(*o) }
func (o *outputFormat) Type() string   { return "human|json" }

// Set implements pflag.Value.
func (o *outputFormat) Set(s string) error {
	switch f := outputFormat(s); f {
	case outputHuman, outputJSON:
		*o = f
		return nil
	}
	return errors.New(`must be "human" or "json"`)
}

func addOutputFlag(cmd *cobra.Command) *outputFormat {
	o := outputHuman
	cmd.Flags().Var(&o, "output", "format of the output")
	return &o
}

// say prints what a command that changes something has done: v in JSON, or else a line for people, unless they want it quiet.
func (o *outputFormat) say(cmd *cobra.Command, v any, line string, args ...any) error {
	if *o == outputJSON {
		return writeJSON(cmd.OutOrStdout(), v)
	}
	if quiet, err := cmd.Flags().GetBool("quiet"); err != nil || quiet {
		return err
	}
	_, err := fmt.Fprintf(cmd.OutOrStdout(), line+"\n", args...)
	return err
}

// writeJSON writes v, indented.
func writeJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "    ")
	enc.SetEscapeHTML(false)
	return enc.Encode(v)
}
