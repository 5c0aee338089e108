package main

import (
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/jedib0t/go-pretty/v6/table"
	"golang.org/x/sys/unix"
)

// columnMax is where the text of a cell is broken into lines.
const columnMax = 60

// printTable shows rows. On a terminal that is wide enough it has lines around
// it; in a narrow one or a pipe it has columns and nothing else, for awk and cut.
func printTable(out io.Writer, header table.Row, rows []table.Row) {
	width := terminalWidth(out)
	t := table.NewWriter()
	t.AppendHeader(header)
	t.AppendRows(rows)
	if width > 0 {
		t.SetStyle(table.StyleLight)
		var wrap []table.ColumnConfig
		for i := range header {
			wrap = append(wrap, table.ColumnConfig{Number: i + 1, WidthMax: columnMax})
		}
		t.SetColumnConfigs(wrap)
		text := t.Render()
		first, _, _ := strings.Cut(text, "\n")
		if len([]rune(first)) <= width {
			fmt.Fprintln(out, text)
			return
		}
		t.SetColumnConfigs(nil)
	}
	plain := table.StyleDefault
	plain.Options = table.OptionsNoBordersAndSeparators
	plain.Box.PaddingLeft, plain.Box.PaddingRight = "", "  "
	t.SetStyle(plain)
	for _, line := range strings.Split(t.Render(), "\n") {
		fmt.Fprintln(out, strings.TrimRight(line, " "))
	}
}

// terminalWidth is how many columns a terminal has; 0 where out is none.
func terminalWidth(out io.Writer) int {
	if c, ok := out.(*canvas); ok {
		return c.width
	}
	f, ok := out.(*os.File)
	if !ok || !isTerminal(f) {
		return 0
	}
	size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
	if err != nil {
		return 0
	}
	if size.Col == 0 {
		return 80 // a terminal that does not know
	}
	return int(size.Col)
}
