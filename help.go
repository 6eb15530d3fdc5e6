package main

import (
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/alecthomas/kong"
)

const description = `Counts unique ids per window, exactly: GET /api/verve/accept?id=ID is answered ok the first time in a minute, and failed for a repeat. The count of each minute goes to a Kafka topic or to a file.

Each setting is a flag, an environment variable (in brackets below) or a key of the --config file; the first one given is used, in this order. An empty variable counts as not set. A value that can never work, and an unknown VERVE_ variable or key, stop the start before anything is written.

Examples:

	verve                                 Run the server. Live page: http://127.0.0.1:8081,
	                                      counts: verve-data/counts.jsonl.
	verve --kafka-brokers=kafka:9092      Send the counts to a Kafka topic.
	verve --window=2s                     Use short windows to try it.
	verve --config=/etc/verve.yaml --print-config
	                                      Show the settings in force and their sources.
	verve totals                          Add up the records and report what is missing.
	source <(verve completion bash)       Complete flags and commands with the tab key.

Exit codes: 0 after a clean stop, 1 after a failure, 2 on a bad setting.`

// relevant are the settings that a command other than serve reads.
var relevant = map[string][]string{
	"totals": {"config", "print-config", "data-dir", "counts-file", "kafka-brokers", "kafka-topic", "kafka-tls",
		"kafka-sasl", "kafka-user", "kafka-password-file"},
	"healthcheck": {"config", "admin-listen"},
	"version":     {},
	"completion":  {},
}

// reads reports whether the command reads the setting, which is one of the server.
func reads(command, name string) bool {
	command, _, _ = strings.Cut(command, " ")
	read, limited := relevant[command]
	return !limited || slices.Contains(read, name)
}

// printHelp shows the flags that the command reads.
func printHelp(options kong.HelpOptions, ctx *kong.Context) error {
	command, _, _ := strings.Cut(ctx.Command(), " ")
	if read, ok := relevant[command]; ok {
		for _, f := range ctx.Model.Flags {
			f.Hidden = f.Hidden || f.Name != "help" && !slices.Contains(read, f.Name)
		}
	}
	for _, flags := range ctx.Model.AllFlags(false) {
		for _, f := range flags {
			f.Tag.Envs = f.Envs // taken away for the sources
		}
	}
	return kong.DefaultHelpPrinter(options, ctx)
}

// files and directories are the settings whose values are such.
var (
	files       = []string{"config", "counts-file", "tls-cert-file", "tls-key-file", "admin-token-file", "kafka-password-file", "callback-secret-file"}
	directories = []string{"data-dir"}
)

// writeCompletion writes a script that makes a shell complete the commands and
// flags of the model. kong's companions would add five modules and start the
// program at each press of the tab key.
func writeCompletion(out io.Writer, shell string, model *kong.Application) {
	var commands []*kong.Node
	for _, n := range model.Children {
		if !n.Hidden {
			commands = append(commands, n)
		}
	}
	flags := slices.Clone(model.Flags)
	for _, c := range commands {
		flags = append(flags, c.Flags...)
	}
	switch shell {
	case "bash":
		completeBash(out, commands, flags)
	case "zsh":
		completeZsh(out, commands, flags)
	case "fish":
		completeFish(out, commands, flags)
	}
}

func completeBash(out io.Writer, commands []*kong.Node, flags []*kong.Flag) {
	words := strings.Join(names(commands), " ")
	var cases strings.Builder
	for _, f := range flags {
		words += " --" + f.Name
		if !f.IsBool() {
			words += "="
		}
		switch {
		case f.Enum != "":
			fmt.Fprintf(&cases, "\t--%s) COMPREPLY=($(compgen -W '%s' -- \"$cur\")); return ;;\n", f.Name, strings.ReplaceAll(f.Enum, ",", " "))
		case slices.Contains(files, f.Name):
			fmt.Fprintf(&cases, "\t--%s) compopt -o filenames; COMPREPLY=($(compgen -f -- \"$cur\")); return ;;\n", f.Name)
		case slices.Contains(directories, f.Name):
			fmt.Fprintf(&cases, "\t--%s) compopt -o filenames; COMPREPLY=($(compgen -d -- \"$cur\")); return ;;\n", f.Name)
		case !f.IsBool():
			fmt.Fprintf(&cases, "\t--%s) return ;;\n", f.Name)
		}
	}
	fmt.Fprintf(out, `_verve() {
	local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]}
	# --flag=value is three words here.
	if [[ $cur == = ]]; then cur=; elif [[ $prev == = ]]; then prev=${COMP_WORDS[COMP_CWORD-2]}; fi
	case $prev in
%s	completion) COMPREPLY=($(compgen -W 'bash zsh fish' -- "$cur")); return ;;
	esac
	COMPREPLY=($(compgen -W '%s' -- "$cur"))
	if [[ ${COMPREPLY[0]} == *= ]]; then compopt -o nospace; fi
}
complete -F _verve verve
`, cases.String(), words)
}

func completeZsh(out io.Writer, commands []*kong.Node, flags []*kong.Flag) {
	plain := strings.NewReplacer("[", "(", "]", ")", ":", " -", "'", "", "`", "")
	fmt.Fprintf(out, "#compdef verve\n_verve() {\n\t_arguments \\\n")
	for _, f := range flags {
		help := plain.Replace(f.Help)
		switch {
		case f.IsBool():
			fmt.Fprintf(out, "\t\t'--%s[%s]' \\\n", f.Name, help)
		case f.Enum != "":
			fmt.Fprintf(out, "\t\t'--%s=[%s]:value:(%s)' \\\n", f.Name, help, strings.ReplaceAll(f.Enum, ",", " "))
		case slices.Contains(files, f.Name):
			fmt.Fprintf(out, "\t\t'--%s=[%s]:file:_files' \\\n", f.Name, help)
		case slices.Contains(directories, f.Name):
			fmt.Fprintf(out, "\t\t'--%s=[%s]:directory:_files -/' \\\n", f.Name, help)
		default:
			fmt.Fprintf(out, "\t\t'--%s=[%s]:value: ' \\\n", f.Name, help)
		}
	}
	fmt.Fprintf(out, "\t\t'1:command:(%s)' '2:shell:(bash zsh fish)'\n}\ncompdef _verve verve\n", strings.Join(names(commands), " "))
}

func completeFish(out io.Writer, commands []*kong.Node, flags []*kong.Flag) {
	plain := strings.NewReplacer("'", "", `\`, "")
	fmt.Fprintln(out, "complete -c verve -f")
	for _, c := range commands {
		fmt.Fprintf(out, "complete -c verve -n __fish_use_subcommand -a %s -d '%s'\n", c.Name, plain.Replace(c.Help))
	}
	fmt.Fprintln(out, "complete -c verve -n '__fish_seen_subcommand_from completion' -a 'bash zsh fish'")
	for _, f := range flags {
		fmt.Fprintf(out, "complete -c verve -l %s -d '%s'", f.Name, plain.Replace(f.Help))
		switch {
		case f.IsBool():
		case f.Enum != "":
			fmt.Fprintf(out, " -x -a '%s'", strings.ReplaceAll(f.Enum, ",", " "))
		case slices.Contains(files, f.Name):
			fmt.Fprint(out, " -r -F")
		case slices.Contains(directories, f.Name):
			fmt.Fprint(out, " -x -a '(__fish_complete_directories)'")
		default:
			fmt.Fprint(out, " -x")
		}
		fmt.Fprintln(out)
	}
}

func names(commands []*kong.Node) (all []string) {
	for _, c := range commands {
		all = append(all, c.Name)
	}
	return all
}
